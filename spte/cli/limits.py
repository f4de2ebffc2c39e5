"""`spte profile --limits`: each kernel beside what this machine can do."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from spte._files import write_whole
from spte._version import __version__
from spte.cli.exit_codes import EXIT_OK
from spte.cli.params import announce_compilation, refuse_too_large, spell_size
from spte.limits.cases import measure_all
from spte.limits.measure import Ratio
from spte.platform import PAGE_SIZE

SCHEMA = "spte-limits/1"
DEFAULT_MEMORY, LEAST_MEMORY = 64 << 30, 64 << 20
TAKES = {"limits": "", "memory": "--memory", "style": "--json or --markdown", "output": "--output"}
BYTES_PER_PAGE = 8 * 513 / 512 + 8 + 4 / 8
"""Memory while measuring: the SPTE and its share of upper tables, the limit's array, two bitmaps each."""
HUGE_PAGE = 2 << 20
COLUMNS = ("work", "ns", "per", "limit", "ns of limit", "ratio", "at most", "")


def refuse_others(context: click.Context) -> None:
    """Refuse options that have no meaning beside --limits."""
    for param in context.command.params:
        if param.name and param.name not in TAKES and context.get_parameter_source(param.name) == click.core.ParameterSource.COMMANDLINE:
            known = ", ".join(filter(None, TAKES.values()))
            raise click.UsageError(f"{param.opts[0]} has no meaning beside --limits, which takes {known}")


def show(memory: int | None, style: str | None, output: Path | None) -> int:
    """Measure on a guest of `memory` bytes and print the table."""
    memory = memory or DEFAULT_MEMORY
    if memory % HUGE_PAGE or memory < LEAST_MEMORY:
        raise click.UsageError(f"--memory {memory} is not a multiple of 2 MiB of at least {spell_size(LEAST_MEMORY)}; round it up")
    refuse_too_large(memory // PAGE_SIZE, BYTES_PER_PAGE, "--memory")
    announce_compilation()
    progress = (lambda name: click.echo(f"spte: {name}", err=True)) if sys.stderr.isatty() else None
    ratios = list(measure_all(memory // PAGE_SIZE, progress=progress))
    if style == "json":
        text = json.dumps(_as_json(memory, ratios), indent=1, allow_nan=False) + "\n"
    elif style == "markdown":
        rows = [COLUMNS, tuple(":--" if i in (0, 2, 3) else "--:" for i in range(len(COLUMNS))), *map(_cells, ratios)]
        text = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)
    else:
        text = f"measured here, one thread unless said, a guest of {spell_size(memory)}\n\n{_plain(ratios)}"
    if output:
        write_whole(output, text)
    else:
        click.echo(text, nl=False)
    return EXIT_OK


def _as_json(memory: int, ratios: list[Ratio]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": __version__,
        "memory_bytes": memory,
        "ratios": [
            {"work": r.name, "unit": r.unit, "ns": r.ns, "limit": r.limit, "limit_ns": r.limit_ns, "ratio": r.ratio, "at_most": r.at_most,
             "met": r.met} for r in ratios
        ],
    }  # fmt: skip


def _cells(r: Ratio) -> tuple[str, ...]:
    bar = "" if r.at_most is None else f"{r.at_most:g}x"
    verdict = {True: "met", False: "missed", None: ""}[r.met]
    return r.name, f"{r.ns:.3g}", r.unit, r.limit, f"{r.limit_ns:.3g}", f"{r.ratio:.3g}x", bar, verdict


def _plain(ratios: list[Ratio]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if i in (0, 2, 3) else "right", no_wrap=True)
    for ratio in ratios:
        table.add_row(*map(Text, _cells(ratio)))
    console = Console(file=io.StringIO(), width=1 << 12, markup=False)
    console.print(table, crop=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"
