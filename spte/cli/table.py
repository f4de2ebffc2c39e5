"""Tables of a profile for terminals and for Markdown: a line a figure and a column a platform and way to log, or the other way round."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spte.cli.metrics import Section, shown
from spte.profile.columns import labels, shared
from spte.profile.report import Row

FALLBACK_WIDTH = 120
UNLIMITED = 1 << 16
DIFFERS = "*"
"""What stands behind a figure of a terminal's table that is not that of the first column."""


class _Line(NamedTuple):
    """A line of a table: what kind of figures it belongs to, its label, its cells, and which of them differ from the first."""

    section: str
    label: str
    cells: tuple[str, ...]
    differs: tuple[bool, ...]


def plain(rows: Sequence[Row], sections: Sequence[Section], *, pivot: bool, color: bool) -> str:
    """Return `rows` as tables no wider than the terminal; columns that do not fit go into further tables below."""
    heads, lines = _turned(*_grid(rows, sections)) if pivot else _grid(rows, sections)
    common = shared([row.column for row in rows])
    title = f"policy {common['policy']}" if "policy" in common else ""
    width = shutil.get_terminal_size(fallback=(FALLBACK_WIDTH, 0)).columns
    console = Console(file=io.StringIO(), width=width, force_terminal=color)
    first = 0
    while first < len(heads):
        last = len(heads)
        while last > first + 1 and _natural_width(_table(title, heads, lines, first, last), console) > width:
            last -= 1
        table = _table(title, heads, lines, first, last)
        console.print(table, "", width=_natural_width(table, console), crop=False)
        first = last
    if any(any(line.differs) for line in lines):
        console.print(f"{DIFFERS} not as in the first {'line' if pivot else 'column'}", "", highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def markdown(rows: Sequence[Row], sections: Sequence[Section], *, pivot: bool) -> str:
    """Return `rows` as a Markdown table; a line that is not exact says so, a figure in bold is not that of the first column."""
    heads, lines = _turned(*_grid(rows, sections)) if pivot else _grid(rows, sections)
    common = shared([row.column for row in rows])
    corner = f"policy {common['policy']}" if "policy" in common else ""
    out = [f"| {corner} | " + " | ".join(", ".join(head) for head in heads) + " |", "| :-- |" + " --: |" * len(heads)]
    for line in lines:
        cells = (f"**{cell}**" if differs else cell for cell, differs in zip(line.cells, line.differs, strict=True))
        out += [f"| {_marked(line)} | " + " | ".join(cells) + " |"]
    return "\n".join([*out, ""])


def _grid(rows: Sequence[Row], sections: Sequence[Section]) -> tuple[list[tuple[str, ...]], list[_Line]]:
    """Return the heads of the columns, and a line a figure."""
    lines = []
    for section in sections:
        for metric in shown(section.metrics, rows):
            values = [metric.value(row) for row in rows]
            differs = tuple(section.exact and value != values[0] for value in values)
            lines.append(_Line(section.title, metric.label, tuple(map(metric.text, rows)), differs))
    return labels([row.column for row in rows]), lines


def _turned(heads: list[tuple[str, ...]], lines: list[_Line]) -> tuple[list[tuple[str, ...]], list[_Line]]:
    """Return the heads and lines of the same table with lines for columns."""
    turned = [
        _Line("", ", ".join(head), tuple(line.cells[i] for line in lines), tuple(line.differs[i] for line in lines))
        for i, head in enumerate(heads)
    ]
    return [tuple(_marked(line).split(", ")) for line in lines], turned


def _marked(line: _Line) -> str:
    return line.label if line.section in ("", "exact") else f"{line.label} ({line.section})"


def _table(title: str, heads: Sequence[tuple[str, ...]], lines: Sequence[_Line], first: int, last: int) -> Table:
    table = Table(
        title=Text(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for head in heads[first:last]:
        table.add_column(Text("\n".join(head)), justify="right", no_wrap=True)
    starred = [any(line.differs[i] for line in lines) for i in range(first, last)]
    section = ""
    for line in lines:
        if line.section != section:
            section = line.section
            table.add_row(Text(section, style="italic"), style="dim")
        cells = zip(line.cells[first:last], line.differs[first:last], starred, strict=True)
        table.add_row(line.label, *(cell + (DIFFERS if differs else " ") * star for cell, differs, star in cells))
    return table


def _natural_width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum
