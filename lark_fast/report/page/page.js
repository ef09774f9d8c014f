"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const views = [];

  // Lines and letters take the page's colours; a spec holds those of the data alone.
  function configuration() {
    const page = getComputedStyle(document.documentElement);
    const colour = (name) => page.getPropertyValue(name).trim();
    const axis = {
      labelColor: colour("--soft"), titleColor: colour("--soft"), tickColor: colour("--line"),
      domainColor: colour("--line"), gridColor: colour("--line"), gridOpacity: 0.6,
      titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12,
    };
    return {
      background: "transparent", font: getComputedStyle(document.body).fontFamily,
      view: { stroke: null }, axis,
      legend: { labelColor: colour("--ink"), titleColor: colour("--soft"), labelFontSize: 12 },
    };
  }

  async function draw() {
    const config = configuration();
    for (const view of views.splice(0)) view.finalize();
    for (const box of document.querySelectorAll("[data-chart]")) {
      const options = {
        // The page's policy forbids making code of text: expressions are interpreted.
        ast: true,
        actions: false, renderer: "svg", config, tooltip: { theme: dark.matches ? "dark" : "light" },
      };
      const made = await vegaEmbed(box, specs[box.dataset.chart], options);
      views.push(made);
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  dark.addEventListener("change", draw);
  draw();
})();
