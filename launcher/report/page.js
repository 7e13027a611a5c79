"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  let printing = false;

  // Only what depends on where the page is looked at; the rest comes with the figure.
  const surroundings = () => {
    const night = dark.matches && !printing;
    const ink = night ? "#e5e7eb" : "#1f2937";
    const grid = night ? "#374151" : "#e5e7eb";
    return {
      "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": ink,
      "xaxis.gridcolor": grid, "yaxis.gridcolor": grid, "xaxis.zerolinecolor": grid, "yaxis.zerolinecolor": grid,
    };
  };

  const fixed = (layout) => ({
    ...layout,
    height: layout.height || 340,
    autosize: true,
    margin: { l: narrow.matches ? 45 : 65, r: 15, t: 10, b: 45 },
    font: { family: "system-ui, sans-serif", size: 12 },
    showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" },
    xaxis: { automargin: true, ...layout.xaxis },
    yaxis: { automargin: true, ...layout.yaxis },
  });

  const charts = [...document.querySelectorAll("[data-chart]")];
  const settings = { responsive: true, displayModeBar: false };
  // Without the bar of buttons: dragging zooms, a double click goes back.
  const draw = (div) => {
    const figure = figures[div.dataset.chart];
    return Plotly.newPlot(div, figure.data, fixed(figure.layout), settings).then(() => Plotly.relayout(div, surroundings()));
  };
  const adapt = () => charts.forEach((div) => Plotly.relayout(div, surroundings()));

  Promise.all(charts.map(draw)).then(() => { document.documentElement.dataset.drawn = String(charts.length); });
  dark.addEventListener("change", adapt);
  addEventListener("beforeprint", () => { printing = true; adapt(); charts.forEach((div) => Plotly.Plots.resize(div)); });
  addEventListener("afterprint", () => { printing = false; adapt(); charts.forEach((div) => Plotly.Plots.resize(div)); });
})();
