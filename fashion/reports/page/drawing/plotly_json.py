"""Draws panels for the page: Plotly's JSON, which plotly.js turns into SVG in the browser.

Plotly is imported only inside the functions that need it, since importing it is slow.
"""

import base64
import gzip
import html
import json
import math
from typing import Any

from fashion.reports.page.content import BLACK, BLUE, DIAGONAL, GRID, ConfusionMatrix, Panel, Series

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GREY_LINE = "#999999"


def plotly_js_base64() -> str:
    """Return plotly.js, compressed with gzip and in base64: 1.9 MB instead of 4.8 MB, and the same bytes every time."""
    return base64.b64encode(gzip.compress(plotly_js().encode(), compresslevel=6, mtime=0)).decode()


def plotly_js() -> str:
    """Return plotly.js, as it comes with the package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def panel_json(panel: Panel | ConfusionMatrix) -> str:
    """Return a panel as Plotly's JSON (data and layout), validated by Plotly.

    The JSON is safe inside a script element: `<`, `>` and `&` are written as JSON escapes.
    """
    import plotly.graph_objects as go

    data, layout = matrix_parts(panel) if isinstance(panel, ConfusionMatrix) else panel_parts(panel)
    figure = go.Figure(data=data, layout=layout)
    figure.update_layout(template=None)
    text = json.dumps(json.loads(figure.to_json()), separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def panel_parts(panel: Panel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a panel's traces and layout."""
    layout = base_layout(panel.title, panel.height)
    layout["xaxis"] |= axis(panel.x_title, panel.x_ticks, panel.x_range)
    layout["yaxis"] |= axis(panel.y_title, panel.y_ticks, panel.y_range)
    if panel.log_x:
        # By default Plotly labels the minor ticks of a log axis only "2" and "5"; "D2" labels them in full.
        layout["xaxis"] |= {"type": "log", "dtick": "D2" if decades(panel) < 1.5 else 1, "exponentformat": "power"}
    layout["shapes"] = [
        {
            "type": "line",
            "x0": line.x,
            "x1": line.x,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": line.colour, "dash": line.dash, "width": 1.5},
            "layer": "between",
        }
        for line in panel.vertical_lines
    ]
    middle = sum(panel.x_range) / 2 if panel.x_range else math.inf
    layout["annotations"] = [
        {
            "x": line.x,
            "yref": "paper",
            "y": 0.02 + 0.98 * line.label_height,
            "yanchor": "top" if line.label_height > 0.5 else "bottom",
            "xanchor": "left" if line.x < middle else "right",
            "text": escape_text(line.label),
            "showarrow": False,
            "font": {"size": 12, "color": BLACK},
            "bgcolor": "rgba(255,255,255,0.8)",
        }
        for line in panel.vertical_lines
        if line.label
    ] + [
        {"x": label.x, "y": label.y, "text": escape_text(label.text), "showarrow": False, "font": {"size": 12}}
        for label in panel.annotations
    ]
    return [trace(series) for series in panel.series], layout


def decades(panel: Panel) -> float:
    """Return how many powers of ten the x values of a panel span."""
    values = [x for series in panel.series for x in series.x if x]
    return math.log10(max(values) / min(values)) if values else 0.0


def base_layout(title: str, height: int) -> dict[str, Any]:
    """Return the layout that all panels share."""
    grid = {"gridcolor": GRID, "linecolor": GREY_LINE, "zeroline": False, "automargin": True, "ticks": "outside"}
    return {
        "title": {"text": f"<b>{escape_text(title)}</b>", "font": {"size": 15}, "x": 0, "xref": "paper", "y": 0.98},
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 64 if title else 36, "b": 48},
        "font": {"family": FONT, "size": 13, "color": BLACK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 12}},
        "xaxis": dict(grid),
        "yaxis": dict(grid),
    }


def axis(title: str, ticks: dict[float, str] | None, limits: tuple[float, float] | None) -> dict[str, Any]:
    """Return the settings of an axis."""
    settings: dict[str, Any] = {"title": {"text": escape_text(title), "font": {"size": 13}, "standoff": 8}}
    if ticks is not None:
        settings |= {"tickvals": list(ticks), "ticktext": [escape_text(text) for text in ticks.values()]}
    if limits is not None:
        settings["range"] = list(limits)
    return settings


def trace(series: Series) -> dict[str, Any]:
    """Return a series as a scatter trace."""
    style = series.style
    modes = [name for name, wanted in (("lines", series.lines), ("markers", series.points)) if wanted]
    return {
        "type": "scatter",
        "mode": "+".join(modes),
        "name": escape_text(series.name),
        "x": list(series.x),
        "y": list(series.y),
        "text": [escape_text(text) for text in series.hover],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": style.colour, "dash": style.dash, "width": style.width},
        "marker": {"color": style.colour, "symbol": style.marker, "size": style.size},
        "connectgaps": False,
    }


def matrix_parts(matrix: ConfusionMatrix) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return a confusion matrix as two heat maps: mistakes coloured by their count, and the diagonal in grey."""
    names = [escape_text(name) for name in matrix.names]
    size = range(len(names))

    def hover_text(label: int, predicted: int) -> str:
        outcome = "correct" if label == predicted else f"predicted as {names[predicted]}"
        return f"{names[label]}, {outcome}: {matrix.counts[label][predicted]}"

    common = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "customdata": [[hover_text(a, b) for b in size] for a in size],
        "texttemplate": "%{z}",
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "showscale": False,
    }
    wrong = [[matrix.counts[a][b] if a != b else None for b in size] for a in size]
    right = [[matrix.counts[a][b] if a == b else None for b in size] for a in size]
    layout = base_layout(matrix.title, matrix.height)
    layout["showlegend"] = False
    layout["margin"]["t"] = 44
    layout["xaxis"] |= axis("predicted", None, None) | {"showgrid": False, "tickangle": -45}
    layout["yaxis"] |= axis("true class", None, None) | {"autorange": "reversed", "showgrid": False}
    return [
        common | {"z": wrong, "zmin": 0, "colorscale": [[0, "#FFFFFF"], [1, BLUE]]},
        common | {"z": right, "colorscale": [[0, DIAGONAL], [1, DIAGONAL]]},
    ], layout


def escape_text(text: str) -> str:
    """Escape text that Plotly would read as markup."""
    return html.escape(text, quote=False)
