"""`spte policies`: every decision, its value from version to version, and on demand what it means and rests on."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence

import click

from spte.policy import NAMES, Policy, changes, decisions, evidence, spell

SCHEMA = "spte-policies/2"
FALLBACK_WIDTH = 100
GAP = 2

History = Sequence[tuple[str, str]]
"""A decision's values, oldest first: each with the version from which on it holds."""

HELP = """List every decision of a kernel version: its value in the oldest one, and each version that changed it.

With a VERSION, from 5.10 on: its decisions, since when each holds, and whether recordings of real KVM on both sides hold it or a commit
alone. A decision can be replaced alone wherever a policy is taken:

\b
  spte policies
  spte policies 6.8
  spte policies --field eager_page_split
  spte profile --policy 6.12 --policy 6.12,eager_page_split=N
"""


@click.command(help=HELP, short_help="List every decision of every kernel version, with its source.")
@click.argument("version", required=False)
@click.option("--field", "fields", multiple=True, metavar="NAME", help="Tell what this decision means, and its source. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `schema` names its version.")
def policies(version: str | None, fields: tuple[str, ...], as_json: bool) -> None:
    """Print the decisions as a table, those of one version, some of them in full, or as JSON."""
    told = {f.name: f.metadata for f in decisions()}
    for name in fields:
        if name not in told:
            raise click.BadParameter(f"{name!r} is no decision; take one of {', '.join(told)}", param_hint="--field")
    width = shutil.get_terminal_size(fallback=(FALLBACK_WIDTH, 0)).columns
    names = fields or tuple(told)
    if version is not None:
        click.echo(_of_version(version, names, width, as_json=as_json))
    elif as_json:
        values = {n: {v: spell(getattr(Policy.named(v), n)) for v in NAMES} for n in names}
        listed = [{"decision": n, "meaning": told[n]["doc"], "changes": _changes(n), "values": by} for n, by in values.items()]
        click.echo(json.dumps({"schema": SCHEMA, "policies": list(NAMES), "decisions": listed}, indent=1))
    elif fields:
        for name in names:
            choices = ", ".join(map(spell, told[name]["choices"]))
            click.echo("\n".join(in_full(name, told[name]["doc"], choices, width)))
    else:
        click.echo("\n".join(table({name: history(name) for name in names}, width)))
        notes = "A value holds until the next version in its line.", "--field NAME tells meaning and source; VERSION what it rests on."
        click.echo("\n".join(["", *(line for note in notes for line in textwrap.wrap(note, width))]))


def _changes(name: str) -> list[dict[str, str]]:
    return [{"version": c.version, "value": spell(c.value), "source": c.source} for c in changes(name)]


def history(name: str) -> History:
    """Return the values of a decision, each with the version from which on it holds."""
    return [(change.version, spell(change.value)) for change in changes(name)]


def _of_version(version: str, names: Sequence[str], width: int, *, as_json: bool) -> str:
    rows = [row for row in evidence(version) if row.decision in names]
    if as_json:
        return json.dumps({"schema": SCHEMA, "version": version, "decisions": [row._asdict() for row in rows]}, indent=1)
    cells = [("decision", version, "since", "held by")]
    cells += [(row.decision, row.value, row.since, _held_by(row.before, row.after, row.source, recorded=row.recorded)) for row in rows]
    columns = [max(len(row[i]) for row in cells) + GAP for i in range(3)]
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * (2 * GAP))
    lines = ("".join(cell.ljust(column) for cell, column in zip(row, columns, strict=False)) + row[3] for row in cells)
    return "\n".join(piece for line in lines for piece in (wrap.wrap(line) if len(line) > width else [line]))


def _held_by(before: str | None, after: str | None, source: str, *, recorded: bool) -> str:
    if not recorded:
        return source
    return f"recordings {before}" if before == after else f"recordings {before} and {after}"


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


def in_full(name: str, meaning: str, choices: str, width: int) -> list[str]:
    """Return the lines on one decision."""
    facts = {change.version: f"{spell(change.value)} ({change.source})" for change in changes(name)} | {"choices": choices}
    left = max(map(len, facts)) + GAP
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent=" " * (left + GAP))
    head = textwrap.wrap(f"{name}: {meaning}", width, break_long_words=False, break_on_hyphens=False)
    return head + [line for key, text in facts.items() for line in wrap.wrap(f"{'':{GAP}}{key:{left}}{text}")]
