"""`spte policies`: every decision, its value from version to version, and on demand what it means and where it is from."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence

import click

from spte.policy import NAMES, Policy, decisions, spell

SCHEMA = "spte-policies/1"
FALLBACK_WIDTH = 100
GAP = 2

History = Sequence[tuple[str, str]]
"""A decision's values, oldest first: each with the version from which on it holds."""

HELP = """List every decision of a kernel version: its value in the oldest one, and each version that changed it.

A decision can be replaced alone wherever a policy is taken:

\b
  spte policies
  spte policies --field eager_page_split
  spte profile --policy 6.12 --policy 6.12,eager_page_split=N
"""


@click.command(help=HELP, short_help="List every decision of every kernel version, with its source.")
@click.option("--field", "fields", multiple=True, metavar="NAME", help="Tell what this decision means, and its source. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `schema` names its version.")
def policies(fields: tuple[str, ...], as_json: bool) -> None:
    """Print the decisions as a table, some of them in full, or as JSON."""
    told = {f.name: f.metadata for f in decisions()}
    for name in fields:
        if name not in told:
            raise click.BadParameter(f"{name!r} is no decision; take one of {', '.join(told)}", param_hint="--field")
    values = {name: {version: spell(getattr(Policy.named(version), name)) for version in NAMES} for name in fields or told}
    width = shutil.get_terminal_size(fallback=(FALLBACK_WIDTH, 0)).columns
    if as_json:
        listed = [{"decision": n, "meaning": told[n]["doc"], "source": told[n]["source"], "values": by} for n, by in values.items()]
        click.echo(json.dumps({"schema": SCHEMA, "policies": list(NAMES), "decisions": listed}, indent=1))
    elif fields:
        for name, by in values.items():
            choices = ", ".join(map(spell, told[name]["choices"]))
            click.echo("\n".join(in_full(name, history(by), told[name]["doc"], choices, told[name]["source"], width)))
    else:
        click.echo("\n".join(table({name: history(by) for name, by in values.items()}, width)))
        notes = f"A value holds until the next version in its line. Versions: {', '.join(NAMES)}.", "--field NAME tells meaning and source."
        click.echo("\n".join(["", *(line for note in notes for line in textwrap.wrap(note, width))]))


def history(values: Mapping[str, str]) -> History:
    """Return the first of `values`, by version, and those that differ from the one before."""
    found: list[tuple[str, str]] = []
    for version, value in values.items():
        if not found or found[-1][1] != value:
            found.append((version, value))
    return found


def table(rows: Mapping[str, History], width: int) -> list[str]:
    """Return a line a decision: its oldest value and then ``version: value`` of each change; a row too long goes on below."""
    oldest = next(iter(rows.values()))[0][0]
    cells = [["decision", oldest, "since"]]
    cells += [[name, values[0][1], *(f"{version}: {value}" for version, value in values[1:])] for name, values in rows.items()]
    columns = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    lines = []
    for row in cells:
        at, line = 0, ""
        for cell, column in zip(row, columns, strict=False):
            if at + len(cell) > width:
                lines.append(line)
                at = columns[0] + columns[1] + 2 * GAP
                line = " " * at
            line = line.ljust(at) + cell
            at += column + GAP
        lines.append(line)
    return lines


def in_full(name: str, values: History, meaning: str, choices: str, source: str, width: int) -> list[str]:
    """Return the lines on one decision."""
    facts = dict(values) | {"choices": choices, "source": source}
    left = max(map(len, facts)) + GAP
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * (left + GAP))
    head = textwrap.wrap(f"{name}: {meaning}", width, break_long_words=False, break_on_hyphens=False)
    return head + [line for key, text in facts.items() for line in wrap.wrap(f"{'':{GAP}}{key:{left}}{text}")]
