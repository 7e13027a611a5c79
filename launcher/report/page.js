"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 40rem)");
  const wide = matchMedia("(min-width: 68rem)"); // the first two charts stand side by side
  const PAPER = { all: 690, half: 325 }; // CSS pixels: between the margins of A4 and of Letter, upright
  let printing = false;

  // Only settings that depend on the viewer; the figure contains the rest.
  const surrounded = (layout, card) => {
    const night = dark.matches && !printing;
    const ink = night ? "#e6e9ef" : "#1f2937";
    const grid = night ? "#2a313c" : "#e4e7ec";
    const axis = { automargin: true, gridcolor: grid, zerolinecolor: grid };
    const is = (...kinds) => kinds.some((kind) => card.classList.contains(kind));
    const large = !printing && (is("hero") ? !narrow.matches : is("tall") && wide.matches);
    return {
      ...layout,
      height: layout.height || (large ? 360 : 250),
      ...(printing ? { autosize: false, width: is("hero", "wide", "alone") ? PAPER.all : PAPER.half } : { autosize: true }),
      margin: { l: 50, r: 18, t: 10, b: 40, ...layout.margin }, // r: half of the label of the last tick
      font: { family: "system-ui, sans-serif", size: 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: { bgcolor: night ? "#171c24" : "#ffffff", bordercolor: grid, font: { color: ink } },
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
    return Plotly.react(div, figure.data, surrounded(figure.layout, div.closest("article")), settings);
  };
  const adapt = () => charts.map(draw);
  const print = (now) => () => { printing = now; adapt(); };

  // The bar shows the group at the top of the window.
  const links = [...document.querySelectorAll("nav a")];
  const mark = () => {
    const above = links.filter((link) => document.querySelector(link.hash).getBoundingClientRect().top < innerHeight / 3);
    for (const link of links) link.classList.toggle("here", link === (above.at(-1) || links[0]));
  };
  addEventListener("scroll", mark, { passive: true });
  mark();

  Promise.all(adapt()).then(() => { document.documentElement.dataset.drawn = String(charts.length); });
  for (const seen of [dark, narrow, wide]) seen.addEventListener("change", adapt);
  addEventListener("beforeprint", print(true));
  addEventListener("afterprint", print(false));
})();
