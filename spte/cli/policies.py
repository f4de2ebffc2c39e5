"""`spte policies`: every decision, its value in each version, and where it comes from."""

from __future__ import annotations

import json
import shutil
from typing import Any

import click

from spte.policy import NAMES, RECORDED, Policy

SCHEMA = "spte-policies/1"


HELP = """List every decision of a kernel version, its value in each, and its source: a commit, a release, a recording.

A decision can be replaced alone wherever a policy is taken:

\b
  spte policies
  spte profile --policy 6.12 --policy 6.12,eager_page_split=N
"""


@click.command(help=HELP, short_help="List every decision of every kernel version, with its source.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `schema` names its version.")
def policies(as_json: bool) -> None:
    """Print the decisions as a table or as JSON."""
    names = NAMES if as_json else RECORDED
    described = {name: Policy.named(name).describe() for name in names}
    decisions: list[dict[str, Any]] = [
        {
            "decision": field,
            "meaning": meaning,
            "source": source,
            "values": {name: rows[i][1] for name, rows in described.items()},
        }
        for i, (field, _, meaning, source) in enumerate(described[names[0]])
    ]
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, "policies": list(NAMES), "decisions": decisions}, indent=1))
    else:
        _print(decisions)


def _print(decisions: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("decision", no_wrap=True)
    for name in RECORDED:
        table.add_column(name, overflow="fold")
    table.add_column("meaning", overflow="fold")
    table.add_column("source", overflow="fold")
    for entry in decisions:
        cells = (entry["decision"], *(entry["values"][name] for name in RECORDED), entry["meaning"], entry["source"])
        table.add_row(*map(Text, cells))
    Console(width=shutil.get_terminal_size(fallback=(120, 0)).columns).print(table)
