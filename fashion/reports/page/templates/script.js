(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  try {
    // The browser itself unpacks the library (DecompressionStream: Chrome 80, Firefox 113, Safari 16.4).
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const library = document.createElement("script");
    library.textContent = await new Response(stream).text();
    document.head.append(library);
    const touch = matchMedia("(pointer: coarse)").matches;
    const points = matchMedia("(hover: hover)").matches;
    for (const plot of plots) {
      const { data, layout } = JSON.parse(plot.querySelector("script").textContent);
      if (touch) layout.dragmode = false;
      await Plotly.newPlot(plot, data, layout, {
        responsive: true, displaylogo: false, displayModeBar: points ? "hover" : false,
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
        toImageButtonOptions: { filename: plot.id, scale: 2 },
      });
    }
    // Plotly fixes a plot's width in pixels. A4 between margins of 12 mm is 690 CSS pixels wide.
    const resize = (change) => plots.forEach((plot) => Plotly.relayout(plot, change));
    addEventListener("beforeprint", () => resize({ width: 690 }));
    addEventListener("afterprint", () => resize({ width: null, autosize: true }));
    document.documentElement.dataset.drawn = plots.length;
  } catch (error) {
    for (const plot of plots) {
      const line = document.createElement("p");
      line.className = "plot-error";
      line.textContent = `This figure could not be drawn (${error}); it needs a browser of 2023 or later.`;
      plot.append(line);
    }
    throw error;
  }
})();
