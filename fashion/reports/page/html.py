"""The HTML of the report page: sections, tables, style sheet and script. Text that it is given is escaped.

One file without any address in it: the plotting library, the figures and the images are inside. Knows no report.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #5b5b5b; --rule: #d9d9d9; --tint: #f5f7f9; --link: #00558a; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1200px; padding: 1.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.35rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
p, figcaption { max-width: 80ch; }
a { color: var(--link); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1rem 0 0; }
.lead { color: var(--soft); margin: 0; }
.banner { border: 3px solid #d55e00; background: #fff4ec; padding: .75rem 1rem; margin: 1.25rem 0; border-radius: 4px; }
.badge { display: inline-block; border: 2px solid #d55e00; border-radius: 3px; padding: 0 .35em; font-size: .75rem;
  font-weight: 700; color: #a04600; white-space: nowrap; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { border-bottom: 2px solid #888; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.first td { background: var(--tint); }
tr.chosen td { font-weight: 600; }
td small { color: var(--soft); font-weight: 400; }
td .error { color: #a04600; overflow-wrap: anywhere; max-width: 40ch; display: inline-block; }
figure { margin: 1rem 0 1.5rem; }
figcaption { color: var(--soft); font-size: .92rem; margin: 0 0 .5rem; }
.panels { display: grid; gap: .5rem 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.panels.one { grid-template-columns: minmax(0, 1fr); }
.pair { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.pair > * { min-width: 0; }
.plot { min-width: 0; }
.plot .sorry { color: #a04600; }
.mistakes { display: grid; gap: 1rem .75rem; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr));
  list-style: none; padding: 0; }
.mistakes img { width: 112px; height: 112px; image-rendering: pixelated; display: block;
  border: 1px solid var(--rule); }
.mistakes span { display: block; font-size: .82rem; line-height: 1.35; margin-top: .2rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
td:first-child { min-width: 8rem; overflow-wrap: anywhere; }
code { font-size: .85em; white-space: nowrap; }
@media (max-width: 600px) {
  body { padding: 1rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  th, td { padding: .25rem .45rem; }
  .mistakes { grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); }
  .mistakes img { width: 96px; height: 96px; }
}
@media print {
  @page { margin: 12mm; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  nav, .modebar { display: none !important; }
  .panels, .pair { display: block; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; white-space: normal !important; }
  figure, .plot, .mistakes li, tr { break-inside: avoid; }
  .mistakes { grid-template-columns: repeat(6, 1fr); }
  h2, h3, figcaption { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

# The library is unpacked by the browser itself (DecompressionStream: Chrome 80, Firefox 113, Safari 16.4). A4 is 690
# CSS pixels wide between margins of 12 mm; Plotly fixes its width in pixels, so it is told before and after printing.
SCRIPT = """
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  try {
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
    const resize = (change) => plots.forEach((plot) => Plotly.relayout(plot, change));
    addEventListener("beforeprint", () => resize({ width: 690 }));
    addEventListener("afterprint", () => resize({ width: null, autosize: true }));
    document.documentElement.dataset.drawn = plots.length;
  } catch (error) {
    for (const plot of plots) {
      const line = document.createElement("p");
      line.className = "sorry";
      line.textContent = `This figure could not be drawn (${error}); it needs a browser of 2023 or later.`;
      plot.append(line);
    }
    throw error;
  }
})();
"""


@dataclass(frozen=True)
class Column:
    """A column of a table; numbers stand to the right."""

    title: str
    number: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page with an entry in its table of contents; `body` is HTML."""

    anchor: str
    title: str
    body: str


@dataclass(frozen=True)
class Picture:
    """An image as PNG with the lines to write under it."""

    png: bytes
    lines: Sequence[str]


def paragraph(text: str, kind: str = "") -> str:
    """Return text as a paragraph."""
    return f"<p{attribute('class', kind)}>{escape(text)}</p>"


def attribute(name: str, value: str) -> str:
    """Return an attribute with a leading space, nothing if it has no value."""
    return f' {name}="{escape(value)}"' if value else ""


def badge(text: str) -> str:
    """Return a loud label."""
    return f'<span class="badge">{escape(text)}</span>'


def banner(title: str, text: str) -> str:
    """Return a box that nobody overlooks."""
    return f'<div class="banner" role="note"><strong>{escape(title)}</strong> {escape(text)}</div>'


def table(columns: Sequence[Column], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return a table; each row is (class, cells), the cells HTML already."""
    kinds = [' class="n"' if column.number else "" for column in columns]
    head = "".join(f'<th scope="col"{k}>{escape(c.title)}</th>' for k, c in zip(kinds, columns, strict=True))
    lines = [
        f"<tr{attribute('class', kind)}>"
        + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, cells, strict=True))
        + "</tr>"
        for kind, cells in rows
    ]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def details(title: str, body: str) -> str:
    """Return HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def figure(name: str, title: str, caption: str, panels: Sequence[tuple[str, int]]) -> str:
    """Return a figure; each panel is (Plotly's JSON, height in pixels)."""
    plots = "\n".join(
        f'<div class="plot" id="{escape(name)}-{place}" role="img" aria-label="{escape(title)}" '
        f'style="min-height: {height}px"><script type="application/json">{content}</script></div>'
        for place, (content, height) in enumerate(panels, start=1)
    )
    shape = "panels one" if len(panels) == 1 else "panels"
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>'
        f'<div class="{shape}">{plots}</div></figure>'
    )


def pictures(items: Sequence[Picture]) -> str:
    """Return images with the lines under them."""
    entries = [
        f'<li><img alt="{escape(item.lines[0])}" src="data:image/png;base64,{base64.b64encode(item.png).decode()}">'
        f"<span>{'<br>'.join(escape(line) for line in item.lines)}</span></li>"
        for item in items
    ]
    return f'<ul class="mistakes">{"".join(entries)}</ul>'


def render(title: str, lead: str, banners: str, sections: Sequence[Section], library: str) -> str:
    """Return the whole page; `library` is plotly.js, gzip'd, in base64."""
    contents = "".join(f'<li><a href="#{escape(s.anchor)}">{escape(s.title)}</a></li>' for s in sections)
    bodies = "\n".join(
        f'<section id="{escape(s.anchor)}">\n<h2>{escape(s.title)}</h2>\n{s.body}\n</section>' for s in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{paragraph(lead, "lead")}
{banners}
<nav aria-label="Contents"><ul>{contents}</ul></nav>
</header>
<main>
<noscript>{paragraph("The figures are drawn by a script inside this file; the tables need none.", "banner")}</noscript>
{bodies}
</main>
<script type="text/plain" id="plotly">{library}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""
