// Tables: a click on a header sorts (again: the other way round; once more: as it was), a long table can be filtered.
// Rows of class "reference" at the top, as the published results, stay there. Without JavaScript all rows are shown.
for (const table of document.querySelectorAll(".table-scroll > table")) {
  const body = table.tBodies[0], original = [...body.rows];
  if (original.length < 3) continue;
  const pinned = original[0].className === "reference" ? 1 : 0;
  const headers = [...table.tHead.rows[0].cells];
  const limit = Number(table.parentElement.dataset.shown) || Infinity;
  let wanted = [], all = false;
  const text = (row, column) => row.cells[column].textContent.trim();
  const number = (value) => parseFloat(value.replaceAll(",", ""));
  const compare = (a, b, column) => {
    const [x, y] = [text(a, column), text(b, column)];
    const difference = headers[column].classList.contains("n") ? number(x) - number(y) : NaN;
    return isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference;
  };
  const show = () => {
    let matching = 0;
    for (const row of body.rows) {
      const words = row.textContent.toLowerCase();
      const fits = wanted.every((word) => words.includes(word));
      matching += fits;
      row.hidden = !fits || (!all && !wanted.length && matching > limit);
    }
    note.textContent = wanted.length ? `${matching} of ${original.length} rows` : "";
    more.hidden = all || wanted.length > 0 || matching <= limit;
  };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      // Numbers are looked at from the largest first.
      const [first, second] = header.classList.contains("n") ? ["descending", "ascending"] : ["ascending", "descending"];
      const order = before === first ? second : before === second ? null : first;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      let rows = original.slice(pinned);
      if (order) {
        header.setAttribute("aria-sort", order);
        const empty = (row) => ["", "-"].includes(text(row, column));
        const known = rows.filter((row) => !empty(row)).sort((a, b) => compare(a, b, column));
        rows = [...(order === "descending" ? known.reverse() : known), ...rows.filter(empty)];
      }
      body.append(...original.slice(0, pinned), ...rows);
      show();
    });
  });
  const tools = document.createElement("div"), input = document.createElement("input");
  const note = document.createElement("span"), more = document.createElement("button");
  tools.className = "table-tools";
  input.type = "search";
  input.placeholder = "filter rows by words";
  input.setAttribute("aria-label", "Filter rows by words");
  input.addEventListener("input", () => {
    wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  });
  more.type = "button";
  more.className = "more";
  more.textContent = `show all ${original.length} rows`;
  more.addEventListener("click", () => { all = true; show(); });
  if (original.length >= 10) {
    tools.append(input, note);
    table.parentElement.before(tools);
    table.parentElement.after(more);
  }
  show();
}
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
