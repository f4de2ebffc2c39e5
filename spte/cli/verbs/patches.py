"""`spte patches`: each patch of the series, before and after."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from spte._version import __version__
from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.params import announce_compilation, target
from spte.cli.series import ARROW, change, markdown, places_text, recorded_text, value_of
from spte.cli.table import FALLBACK_WIDTH
from spte.patches.groups import Group, of_patches, of_versions
from spte.patches.recorded import recorded
from spte.patches.states import PATCHES, around
from spte.patches.trial import COUNTS, Outcome, Value
from spte.policy import spell
from spte.trace import default_trace

SCHEMA = "spte-patches/1"

HELP = """Each of the 14 patches, before and after: what the one decision changes, and whether it is what is specified.

A scenario runs on a fresh VM with the patches before this one, then with this one too. A cell shows before→after, or one
number where nothing changes:

\b
  written    SPTEs that the step under test writes; it writes one to zap it, too
  zapped     leaves that it drops, by themselves or with their table
  faults     page faults of the guest's accesses after the step
  flushes    TLB flushes that the step requests
  requests   vCPUs that it asks to update their PML control
  entries    PML entries of the accesses after the step
  recorded   what real kernels did in the same situation, at other sizes: Linux 5.10 before the series, 6.12 after it

Columns in which nothing is counted and nothing specified are left out. Without --patch follow what enabling and disabling
do in each version, and the series as a whole on the recorded trace that ships in the package; there, all counts are those
of the whole time, and nothing but lost pages and requests is specified. The exit code is 1 if any value is not as
specified.

\b
  spte patches
  spte patches --patch 5
  spte patches --json > patches.json
"""
_LABELS = {
    "sptes_written": "written", "zapped": "zapped", "faults_after": "faults", "flushes": "flushes", "pml_requests": "requests",
    "pml_entries": "entries",
}  # fmt: skip


@click.command(help=HELP, short_help="Each of the 14 patches, before and after.")
@click.option("--patch", type=click.IntRange(1, len(PATCHES)), metavar="N", help=f"Only patch N, 1 to {len(PATCHES)}.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; `schema` names its version.")
@click.option("--markdown", "as_page", is_flag=True, help="Print the patches as a page of Markdown: docs/series.md.")
@click.option("--report", type=target(".html"), metavar="FILE.html", help="Write a page of tables; needs plotly.")
def patches(patch: int | None, as_json: bool, as_page: bool, report: Path | None) -> int:
    """Run the scenarios, print them, and return the exit code."""
    if as_json and as_page:
        raise click.UsageError("--json and --markdown exclude each other; take one")
    if report:
        from spte.cli.html.page import write
        from spte.cli.html.profile import patches as sections
    announce_compilation()
    groups = of_patches() if patch is None else of_patches([patch])
    if patch is None and not as_page:
        groups += of_versions(default_trace())
    if as_json:
        click.echo(json.dumps(_as_json(groups), indent=1))
    elif as_page:
        click.echo(markdown(groups), nl=False)
    else:
        _print(groups)
    if report:
        write(report, "spte patches: the 14 patches, before and after", [], sections(groups))
    wrong = [(outcome.scenario.name, text) for outcome in _outcomes(groups) for text in outcome.differences]
    for name, text in wrong:
        click.echo(f"spte patches: {name}: {text}", err=True)
    return EXIT_DIFFERENCE if wrong else EXIT_OK


def _outcomes(groups: Sequence[Group]) -> list[Outcome]:
    return [outcome for group in groups for outcome in group.outcomes]


def _as_json(groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "spte_version": __version__,
        "as_specified": all(outcome.as_specified for outcome in _outcomes(groups)),
        "groups": [
            {
                "title": group.title,
                "patch": group.patch and group.patch.number,
                "commit": group.patch and group.patch.commit,
                "decision": group.patch and group.patch.decision,
                "scenarios": [_scenario_json(outcome) for outcome in group.outcomes],
            }
            for group in groups
        ],
    }


def _scenario_json(outcome: Outcome) -> dict[str, Any]:
    scenario = outcome.scenario
    return {
        "scenario": scenario.name,
        "claim": scenario.claim,
        "platform": scenario.platform if isinstance(scenario.platform, str) else scenario.platform.name,
        "manual": scenario.manual,
        "vcpus": scenario.vcpus,
        "policies": [policy.name for policy in scenario.policies],
        "seen": list(outcome.seen),
        "expected": dict(scenario.expected),
        "recorded": [{**row.place._asdict(), "values": [row.before, row.after]} for row in recorded(scenario.name)],
        "as_specified": outcome.as_specified,
        "differences": outcome.differences,
    }


def _print(groups: Sequence[Group]) -> None:
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size(fallback=(FALLBACK_WIDTH, 0)).columns
    console = Console(file=io.StringIO(), width=width, force_terminal=sys.stdout.isatty(), highlight=False)
    for group in groups:
        console.print(Text(_heading(group), style="bold"))
        if group.patch is None or group.outcomes:
            console.print(_table(group))
        console.print()
    outcomes = _outcomes(groups)
    good = sum(outcome.as_specified for outcome in outcomes)
    console.print(f"{good} of {len(outcomes)} scenarios as specified")
    assert isinstance(console.file, io.StringIO)
    for line in console.file.getvalue().splitlines():
        click.echo(line.rstrip())


def _heading(group: Group) -> str:
    patch = group.patch
    if patch is None:
        return group.title
    text = f"Patch {patch.number}, {patch.commit}: {patch.title}"
    if patch.decision:
        before, after = (spell(getattr(policy, patch.decision)) for policy in around(patch.number))
        return f"{text}\n{patch.decision}: {before} {ARROW} {after}"
    return text if group.outcomes else f"{text}\nno behaviour to measure"


def _table(group: Group) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    stacked = group.patch is None
    join = "\n" if stacked else ARROW
    counts = [name for name in COUNTS if any(_matters(name, outcome) for outcome in group.outcomes)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("scenario", overflow="fold")
    if stacked:
        table.add_column("policy", no_wrap=True)
    for name in counts:
        table.add_column(_LABELS[name], justify="right", no_wrap=True)
    has_recorded = any(recorded(outcome.scenario.name) for outcome in group.outcomes)
    if has_recorded:
        table.add_column("recorded", overflow="fold")
    table.add_column("spec", no_wrap=True)
    for outcome in group.outcomes:
        cells = [_cell([seen[name] for seen in outcome.seen], join) for name in counts]
        if stacked:
            cells.insert(0, "\n".join(policy.name for policy in outcome.scenario.policies) if outcome.seen else "")
        if has_recorded:
            cells.append("\n".join(map(recorded_text, recorded(outcome.scenario.name))))
        verdict = Text("yes") if outcome.as_specified else Text("NO", style="bold red")
        table.add_row(_about(outcome), *map(Text, cells), verdict, end_section=stacked)
    return table


def _matters(count: str, outcome: Outcome) -> bool:
    return count in outcome.scenario.expected or any(seen[count] for seen in outcome.seen)


def _about(outcome: Outcome) -> Any:
    from rich.text import Text

    text = Text(f"{outcome.scenario.name}:", style="bold")
    text.append(f" {outcome.scenario.claim}", style="not bold")
    for name in outcome.scenario.expected:
        if name not in COUNTS:
            values = _cell([seen[name] for seen in outcome.seen], f" {ARROW} ")
            text.append(f"\n{name.replace('_', ' ')} {values}", style="not bold dim")
    if rows := recorded(outcome.scenario.name):
        text.append(f"\nrecorded: {places_text(rows)}", style="not bold dim")
    return text


def _cell(values: Sequence[Value], join: str) -> str:
    return change(values, join) if ARROW in join else join.join(map(value_of, values))
