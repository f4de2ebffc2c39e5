"""`spte migrate`: will pre-copy converge, how long does it take, and does every page arrive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from spte._files import write_whole
from spte._version import __version__
from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.migration.options import axis, check, combinations, name_of, with_settings
from spte.cli.migration.text import Axis, grid, listing, lost_line, rounds, title, verdict
from spte.cli.params import announce_compilation, target
from spte.cli.progress import steps_bar
from spte.migrate import Outcome, Plan
from spte.migrate import migrate as run_migrate
from spte.migrate.settings import STRESS

SCHEMA = "spte-migrate/1"

HELP = """Whether pre-copy live migration converges for a program's writes, how long it takes, and whether every page arrives.

TRACE is a write trace, such as `spte record` writes, or one of two that ship in the package, redis (the default) and
sqlite. The guest performs it in its own time while pages are sent: enable dirty logging, send all, then rounds of
harvest and send, until what remains fits into the downtime; stop the guest, send the rest. Each page carries a version;
one that arrives in an older version than the source has is named, with exit code 1. With --cost, dirty logging takes the
guest's time, too: counts are exact, their costs have a source each. That a migration does not converge is a result, exit code 0.

\b
  spte migrate redis --bandwidth 1Gbit --downtime 300ms
  spte migrate redis --bandwidth 300Mbit --throttle auto-converge
  spte migrate redis --grid bandwidth=200Mbit,1Gbit,10Gbit --grid downtime=50ms,300ms --plot map.png
  spte migrate sqlite --log initially-set --clear-chunk 65536 --platform npt --cost guess
  spte migrate --workload stress --nested --stop-at 30s

--grid takes any option with several values, and may be given again: two of them make a map, else there is a line for each
combination. --workload stress writes page after page over all memory, again and again, at --rate.
"""


@click.command(help=HELP, short_help="Will live migration converge: rounds, total time, downtime.")
@click.argument("trace", required=False)
@click.option("--workload", type=click.Choice(["trace", STRESS]), default="trace", show_default=True)
@with_settings
@click.option("--grid", "axes", type=axis, multiple=True, metavar="OPTION=V,V", help="Vary an option; repeatable.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print Markdown tables.")
@click.option("--output", type=target(stream=True), metavar="FILE", help="Print there instead of stdout.")
@click.option("--plot", type=target(".png", ".svg"), metavar="FILE.png", help="Draw the rounds, or the map of two --grid.")
@click.option("--report", type=target(".html"), metavar="FILE.html", help="Write a page of pictures and tables; needs plotly.")
def migrate(
    trace: str | None,
    workload: str,
    axes: tuple[Axis, ...],
    style: str | None,
    output: Path | None,
    plot: Path | None,
    report: Path | None,
    **options: Any,
) -> int:
    """Check every option, migrate, print, and return the exit code."""
    base = {name: value for name, value in options.items() if value is not None}
    if workload == STRESS and trace is not None:
        raise click.UsageError(f"{trace!r} with --workload stress: one of both says what the guest writes; take one")
    if "rate" in base and workload != STRESS:
        raise click.UsageError("--rate is for --workload stress; a trace has its own")
    base["trace"] = STRESS if workload == STRESS else trace or "redis"
    points = combinations(axes, base)
    if plot and axes and len(axes) != 2:
        raise click.UsageError(f"--plot draws one migration, or the map of two --grid; there are {len(axes)}")
    if plot:
        from spte.cli.migration import plot as pictures
    if report:
        from spte.cli.html import migration as reports
        from spte.cli.html.page import write
    announce_compilation()
    plans: list[Plan] = [check(point) for point in points]
    outcomes = _run(plans)
    heading = title(plans[0], base.get("cost"), [key for key, _ in axes])
    if style == "json":
        text = json.dumps(_as_json(plans, outcomes), indent=1, allow_nan=False)
    elif axes:
        text = _of_grid(axes, points, outcomes, heading, style)
    else:
        (plan,), (outcome,) = plans, outcomes
        markdown = style == "markdown"
        shown = [rounds(plan, outcome, markdown=markdown), "", *verdict(plan, outcome, markdown=markdown)]
        text = "\n".join([*([heading, ""] if style is None else []), *shown])
    if output:
        write_whole(output, text + "\n")
    else:
        click.echo(text)
    if plot and axes:
        pictures.draw_grid(axes, [one.figures() for one in outcomes], heading, plot)
    elif plot:
        pictures.draw_rounds(outcomes[0], heading, plot)
    if report:
        keys, figures = [key for key, _ in axes], [outcome.figures() for outcome in outcomes]
        parts = reports.many(keys, points, figures, axes) if axes else reports.one(plans[0], outcomes[0])
        write(report, f"spte migrate: {plans[0].workload.trace.command[:80]}", text.splitlines() if style is None else [heading], parts)
    return _report_losses(outcomes)


def _run(plans: list[Plan]) -> list[Outcome]:
    outcomes = []
    with steps_bar() as progress:
        for number, plan in enumerate(plans):
            if progress is not None:
                progress(number, len(plans), f"{plan.platform} {plan.log}")
            outcomes.append(run_migrate(plan))
    return outcomes


def _of_grid(axes: Sequence[Axis], points: Sequence[dict[str, Any]], outcomes: list[Outcome], heading: str, style: str | None) -> str:
    keys, figures, markdown = [key for key, _ in axes], [one.figures() for one in outcomes], style == "markdown"
    is_map = len(axes) == 2
    shown = grid(axes, figures, markdown=markdown) if is_map else listing(keys, points, figures, markdown=markdown)
    told = f"{heading}\n{' and '.join(map(name_of, keys))} vary" + "; total time (downtime) where it converges" * is_map
    return "\n".join([*([told, ""] if style is None else []), shown])


def _as_json(plans: list[Plan], outcomes: list[Outcome]) -> dict[str, Any]:
    runs = [{"plan": plan.describe(), **outcome.as_json()} for plan, outcome in zip(plans, outcomes, strict=True)]
    return {"schema": SCHEMA, "spte_version": __version__, "runs": runs}


def _report_losses(outcomes: list[Outcome]) -> int:
    losses = [outcome for outcome in outcomes if len(outcome.lost)]
    for outcome in losses:
        click.echo(f"spte migrate: {lost_line(outcome)}", err=True)
    return EXIT_DIFFERENCE if losses else EXIT_OK
