// Draws every chart of the page when it comes into sight, in the colours of the page, light or dark.
"use strict";
(() => {
  const LIGHT = ["#2457c5", "#c2410c", "#11703a", "#7c3aed", "#be185d", "#0e7490", "#a16207", "#566071"];
  const DARK = ["#8ab4ff", "#ffb070", "#5cc98a", "#c4a7ff", "#f59ac4", "#67d3e8", "#e7c65b", "#a7b1bf"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const touched = matchMedia("(pointer: coarse)");
  const CONFIG = { displayModeBar: false, responsive: true };
  const drawn = new Set();

  const themed = (layout) => {
    const page = getComputedStyle(document.documentElement);
    const colour = (name) => page.getPropertyValue(name).trim();
    const axis = (own) => ({
      gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true,
      exponentformat: "e", ...own,
    });
    return {
      margin: { l: 46, r: 10, t: 8, b: 40 },
      legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { size: 12 } },
      ...layout,
      dragmode: touched.matches ? false : "zoom",
      colorway: dark.matches ? DARK : LIGHT,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--soft"), family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12 },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--line"), font: { color: colour("--ink") }, namelength: -1 },
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
    };
  };

  // The mean of so many values around each; at the ends of a line of those that are there.
  const smoothed = (values, width) => {
    const sums = [0];
    for (const value of values) sums.push(sums.at(-1) + value);
    return values.map((_, place) => {
      const first = Math.max(0, place - (width >> 1));
      const last = Math.min(values.length, place + (width >> 1) + 1);
      return (sums[last] - sums[first]) / (last - first);
    });
  };
  const smoothing = document.getElementById("smoothing");

  const draw = (place) => {
    const figure = JSON.parse(place.nextElementSibling.textContent);
    const width = +(smoothing?.value ?? 1);
    if (width > 1) for (const trace of figure.data) if (trace.mode === "lines") trace.y = smoothed(trace.y, width);
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    for (const trace of figure.data) if (trace.error_x) trace.error_x.color = ink;
    Plotly.react(place, figure.data, themed(figure.layout), CONFIG);
    drawn.add(place);
  };

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) {
        seen.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "300px" });
  for (const place of document.querySelectorAll(".plot")) seen.observe(place);
  dark.addEventListener("change", () => drawn.forEach(draw));
  smoothing?.addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(draw));
})();
