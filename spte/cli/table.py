"""Tables of a profile for terminals and for Markdown: a column a platform, a table a policy."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spte.cli.metrics import COUNTS, MEASURED, RATES, Metric, shown, spell
from spte.profile.report import Row

FALLBACK_WIDTH = 120
UNLIMITED = 1 << 16
SECTIONS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("exact", COUNTS + RATES),
    ("measured here", MEASURED),
)


def plain(rows: Sequence[Row], *, color: bool) -> str:
    """Return `rows` as tables no wider than the terminal; platforms that do not fit go into further tables below."""
    width = shutil.get_terminal_size(fallback=(FALLBACK_WIDTH, 0)).columns
    console = Console(file=io.StringIO(), width=width, force_terminal=color)
    for policy, columns in _by_policy(rows):
        while columns:
            fits = len(columns)
            while fits > 1 and _natural_width(_table(policy, columns[:fits]), console) > width:
                fits -= 1
            table = _table(policy, columns[:fits])
            console.print(table, "", width=_natural_width(table, console), crop=False)
            columns = columns[fits:]
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """Return `rows` as Markdown tables; a measured line says so."""
    lines = []
    for policy, group in _by_policy(rows):
        lines += [f"| policy {policy} | " + " | ".join(row.platform for row in group) + " |"]
        lines += ["| :-- |" + " --: |" * len(group)]
        for section, metrics in SECTIONS:
            mark = "" if section == "exact" else f" ({section})"
            for metric in shown(metrics, group):
                values = " | ".join(spell(metric.value(row)) for row in group)
                lines += [f"| {metric.label}{mark} | {values} |"]
        lines += [""]
    return "\n".join(lines)


def _table(policy: str, rows: Sequence[Row]) -> Table:
    table = Table(
        title=Text(f"policy {policy}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_column(Text(row.platform), justify="right", no_wrap=True)
    for section, metrics in SECTIONS:
        table.add_row(Text(section, style="italic"), style="dim")
        for metric in shown(metrics, rows):
            table.add_row(metric.label, *(spell(metric.value(row)) for row in rows))
    return table


def _natural_width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum


def _by_policy(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for policy, group in itertools.groupby(rows, key=lambda row: row.policy):
        yield policy, list(group)
