"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const PAPER = 660; // CSS pixels: fits between the margins of A4 and of Letter, upright
  let printing = false;

  // Only settings that depend on the viewer; the figure contains the rest.
  const surrounded = (layout) => {
    const night = dark.matches && !printing;
    const ink = night ? "#e5e7eb" : "#1f2937";
    const grid = night ? "#374151" : "#e5e7eb";
    const axis = { automargin: true, gridcolor: grid, zerolinecolor: grid };
    return {
      ...layout,
      height: layout.height || 340,
      ...(printing ? { autosize: false, width: PAPER } : { autosize: true }),
      margin: { l: narrow.matches ? 45 : 65, r: 15, t: 10, b: 45 },
      font: { family: "system-ui, sans-serif", size: 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
  };

  const charts = [...document.querySelectorAll("[data-chart]")];
  const settings = { responsive: true, displayModeBar: false };
  // No bar of buttons: dragging zooms, and a double click resets the zoom.
  const draw = (div) => {
    const figure = figures[div.dataset.chart];
    return Plotly.react(div, figure.data, surrounded(figure.layout), settings);
  };
  const adapt = () => charts.map(draw);
  const print = (now) => () => { printing = now; adapt(); };

  Promise.all(adapt()).then(() => { document.documentElement.dataset.drawn = String(charts.length); });
  dark.addEventListener("change", adapt);
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
})();
