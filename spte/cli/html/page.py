"""The page: a title, lines of text, figures, tables; what each figure and table holds is told in words, too."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import plotly.io
from plotly.offline import get_plotlyjs

from spte._files import write_whole
from spte._version import __version__

BLUE, ORANGE, GREEN, GREY, PURPLE, RED = "#0072B2", "#E69F00", "#009E73", "#777777", "#CC79A7", "#B00000"
"""Okabe and Ito's palette, told apart by colour-blind readers; without colour patterns, dashes and symbols tell them apart."""
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY, RED)
PATTERNS = ("", "/", "x", ".", "-", "+")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x")

# Nothing is fetched, whatever a script asks for.
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; worker-src blob:"

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #111; background: #fff }
h1 { font-size: 1.35em } h2 { font-size: 1.1em; margin-top: 2em } pre { white-space: pre-wrap; font: 13px/1.4 ui-monospace, monospace }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
th, td { padding: .25em .7em; border-bottom: 1px solid #ccc }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
th { text-align: right; vertical-align: bottom; border-bottom: 2px solid #333 }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid #0072B2 }
th[aria-sort=ascending] button::after { content: " \\25B2" } th[aria-sort=descending] button::after { content: " \\25BC" }
footer { margin-top: 3em; color: #555; font-size: 12px }
"""

SCRIPT = """
document.querySelectorAll('table').forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const value = row => row.cells[column].dataset.v;
    const numbers = [...table.tBodies[0].rows].every(row => value(row) === '' || !isNaN(value(row)));
    const order = (a, b) => value(a) === '' || value(b) === '' ? (value(a) === '') - (value(b) === '')
      : (up ? 1 : -1) * (numbers ? value(a) - value(b) : value(a).localeCompare(value(b)));
    [...table.tBodies[0].rows].sort(order).forEach(row => table.tBodies[0].append(row));
  }));
});
"""


class Cell(NamedTuple):
    """A cell of a table: what is shown, and what it is sorted by; None is last."""

    text: str
    value: float | str | None


class Section(NamedTuple):
    """A part of the page: its heading, a sentence, and a figure or the rows of a table, the first of which are its heads."""

    heading: str
    text: str = ""
    figure: Any = None
    rows: Sequence[Sequence[Cell | str]] = ()


def write(path: Path, title: str, lines: Sequence[str], sections: Sequence[Section]) -> None:
    """Write the page of `title`, `lines` below it and `sections` to `path`."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(chr(10).join(lines))}</pre>" if lines else "",
        *(_section(index, section) for index, section in enumerate(sections)),
        f"<footer>spte {__version__}. A click on a head sorts its table. Lines in a legend can be switched off.</footer>",
        f"<script>{SCRIPT}</script></body></html>",
    ]
    write_whole(path, "".join(parts))


def _section(index: int, section: Section) -> str:
    parts = [f"<h2>{html.escape(section.heading)}</h2>", f"<p>{html.escape(section.text)}</p>" if section.text else ""]
    if section.figure is not None:
        parts.append(plotly.io.to_html(
            section.figure, include_plotlyjs=False, full_html=False, div_id=f"figure-{index}",
            config={"displaylogo": False, "responsive": True}, default_height=f"{section.figure.layout.height or 420}px",
        ))  # fmt: skip
    if section.rows:
        parts.append(_table(section.rows))
    return "".join(parts)


def _table(rows: Sequence[Sequence[Cell | str]]) -> str:
    head, *body = rows
    heads = "".join(f"<th><button>{html.escape(_cell(cell).text)}</button></th>" for cell in head)
    lines = ("".join(_td(_cell(cell)) for cell in row) for row in body)
    rows_ = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows_}</tbody></table></div>'


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell, cell) if isinstance(cell, str) else cell


def _td(cell: Cell) -> str:
    value = "" if cell.value is None else cell.value
    return f'<td data-v="{html.escape(str(value), quote=True)}">{html.escape(cell.text)}</td>'


def figure(x: str, y: str, **layout: Any) -> Any:
    """Return an empty figure with the titles of its axes."""
    axes = {name: {"title": {"text": text}, "rangemode": "tozero"} for name, text in (("xaxis", x), ("yaxis", y))}
    shown = go.Figure(layout={"template": "plotly_white", **axes, "legend": {"orientation": "h", "y": 1.12}, "margin": {"t": 40, "r": 20}})
    return shown.update_layout(**layout)


def bars(figure_: Any, number: int, name: str, x: Sequence[Any], y: Sequence[float], **more: Any) -> None:
    """Add bars, the `number`th of the figure's series: its colour and pattern."""
    figure_.add_bar(x=list(x), y=list(y), name=name, marker={
        "color": COLOURS[number % len(COLOURS)], "pattern": {"shape": PATTERNS[number % len(PATTERNS)], "solidity": 0.3},
        "line": {"color": "#222", "width": 1},
    }, **more)  # fmt: skip


def steps(figure_: Any, number: int, name: str, bounds: Sequence[float], y: Sequence[float | None]) -> None:
    """Add a line of steps: `y` between each two of `bounds`."""
    figure_.add_scatter(x=list(bounds), y=[*y, y[-1]] if y else [], name=name, mode="lines", line={
        "shape": "hv", "color": COLOURS[number % len(COLOURS)], "dash": DASHES[number % len(DASHES)], "width": 2,
    })  # fmt: skip


def points(figure_: Any, number: int, name: str, x: Sequence[float], y: Sequence[float], texts: Sequence[str] = ()) -> None:
    """Add single points, with a text each that shows when they are pointed at."""
    figure_.add_scatter(x=list(x), y=list(y), name=name, mode="markers", text=list(texts) or None, marker={
        "symbol": SYMBOLS[number % len(SYMBOLS)], "color": COLOURS[number % len(COLOURS)], "size": 9, "line": {"color": "#222", "width": 1},
    })  # fmt: skip
