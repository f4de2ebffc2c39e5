"""`spte papers`: published experiments on the model, published against estimated."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from spte._files import write_whole
from spte.cli.exit_codes import EXIT_OK
from spte.cli.params import announce_compilation, target
from spte.cli.text import columns, pipes
from spte.cost import CostError, CostProfile, dump, load, names
from spte.papers import MACHINES, Comparison, Experiment, PapersError, compare, experiments, fit, measured, perform
from spte.papers.compare import Line, verdict
from spte.papers.published import FIT, PREDICTION, REPORTED
from spte.profile.report import Row

SCHEMA = "spte-papers/1"
HEAD = ("run", "phase", "published", "estimated", "est/pub", "to before, published", "estimated", "left, ns/page")

SUMMARY = ("", "experiment", "what it is here", "times within a factor of 2", "typical factor")

HELP = """Published experiments with dirty_log_perf_test, run again on the model at their real sizes.

Counts are the model's. Costs are fitted on two of the experiments, F1 and F3; what these do not tell of is a guess, and
the others are predictions: a prediction holds if its times are typically (geometric mean) within a factor of two. `left` is what
was published less the estimate, for each 4 KiB page: what a missing cost would have to be. Takes about two minutes and 2 GB.

\b
  spte papers
  spte papers --figure F5 --cost matlack
  spte papers --fit skylake --save skylake.toml
"""

Rows = dict[str, dict[str, Row]]


@click.command(help=HELP, short_help="Published experiments, run again: published against estimated.")
@click.option("--figure", "figures", multiple=True, metavar="NAME", help="Only this experiment; repeatable: F1 to F7.")
@click.option("--cost", metavar="NAME|FILE", help=f"Take these costs, and fit none: {', '.join(names())}, or a TOML file.")
@click.option(
    "--fit", "machine", type=click.Choice(list(MACHINES)), default="matlack", show_default=True,
    help="Fit the costs of that machine: skylake and haswell on F4, which then is no prediction.",
)
@click.option("--save", type=target(".toml"), metavar="FILE.toml", help="Write the fitted costs there.")
@click.option("--summary", is_flag=True, help="A line an experiment, in place of its times.")
@click.option("--report", type=target(".html"), metavar="FILE.html", help="Write a page of pictures and tables; needs plotly.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print Markdown tables.")
def papers(
    figures: tuple[str, ...],
    cost: str | None,
    machine: str,
    save: Path | None,
    summary: bool,
    report: Path | None,
    style: str | None,
) -> int:
    """Run, fit, compare, print; a misfit is a result, not an error."""
    if report:
        from spte.cli.html.page import write
        from spte.cli.html.profile import papers as sections
    if cost and save:
        raise click.UsageError(f"--save {str(save)!r} writes fitted costs, and with --cost none are fitted; take one")
    try:
        wanted = experiments(*figures)
        costs = load(cost) if cost else None
    except (CostError, PapersError) as error:
        raise click.UsageError(str(error)) from None
    announce_compilation()
    fitted = () if costs else experiments(*MACHINES[machine].experiments)
    rows = _perform([*wanted, *(each for each in fitted if each not in wanted)])
    if costs is None:
        costs = fit(machine, measured(machine, rows), load("guess"))
    if save:
        write_whole(save, dump(costs))
    found = [compare(_in_role(each, fitted), rows[each.name], costs.costs) for each in wanted]
    text = _json(found, costs) if style == "json" else _text(found, costs, summary=summary, markdown=style == "markdown")
    click.echo(text, nl=False)
    if report:
        told = _text(found, costs, summary=True, markdown=False).splitlines()
        write(report, "spte papers: published against estimated", told, sections(found))
    return EXIT_OK


def _in_role(each: Experiment, fitted: Sequence[Experiment]) -> Experiment:
    """Return the experiment as what it is here: what costs are fitted on is no prediction, all else is that is judged."""
    if each.role == REPORTED:
        return each
    return each._replace(role=FIT if each in fitted else PREDICTION)


def _perform(wanted: Sequence[Experiment]) -> Rows:
    """Return what the model did in each run by experiment and label; runs that do not differ here are performed once."""
    done: dict[tuple[Any, ...], Row] = {}
    found: Rows = {}
    total = sum(len(each.runs) for each in wanted)
    for each in wanted:
        for run in each.runs:
            same = (run.platform, run.policy, run.iterations, *sorted(run.options.items()))
            if same not in done:
                done[same] = perform(run)
            found.setdefault(each.name, {})[run.label] = done[same]
            if sys.stderr.isatty():
                click.echo(f"\r{sum(map(len, found.values()))} of {total} runs", err=True, nl=False)
    if sys.stderr.isatty():
        click.echo("", err=True)
    return found


def _text(found: Sequence[Comparison], costs: CostProfile, *, summary: bool = False, markdown: bool) -> str:
    lines = []
    for each in [] if summary else found:
        about = each.experiment
        title = f"{about.name}, {about.role}: {about.title}. {about.source}; {about.date}, machine: {about.machine}"
        lines += [f"### {title}" if markdown else title, ""]
        rows = [HEAD, *_cells(each)]
        lines += [*(pipes(rows, 2) if markdown else columns(rows, 2)), "", _summary(each)]
        lines += [f"not in the model: {missing}" for missing in about.missing]
        lines.append("")
    rows = [SUMMARY, *(_summarized(each) for each in found)]
    lines += [*(pipes(rows, 3) if markdown else columns(rows, 3)), ""]
    lines.append(f"costs of {costs.name}: {costs.title}; guesses: {', '.join(costs.guesses) or 'none'}")
    if any(each.holds is not None for each in found):
        lines.append(verdict(found))
    return "".join(f"{line}\n" for line in lines)


def _cells(each: Comparison) -> list[tuple[str, ...]]:
    cells = [_time(line) for line in each.lines]
    for run in each.experiment.runs:
        cells += [(run.label, phase, f"{seconds:.4g} s", "n/a", "", "", "", "") for phase, seconds in run.unpredicted.items()]
    for line in each.counts:
        ratio = [f"x {x:.3g}" for x in line.to_before] if line.to_before else ["", ""]
        less = f"{line.published - line.estimated:,.0f} fewer" if line.published != line.estimated else "equal"
        cells.append((line.run, f"{line.what} (exact)", f"{line.published:,.0f}", f"{line.estimated:,.0f}", less, *ratio, ""))
    return cells


def _time(line: Line) -> tuple[str, ...]:
    ratio = [f"x {x:.3g}" for x in line.to_before] if line.to_before else ["", ""]
    off = f"{line.factor:.2f}" + ("" if line.holds else " !")
    return (line.run, line.what, f"{line.published:.4g} s", f"{line.estimated:.4g} s", off, *ratio, f"{line.ns_a_page:.2f}")


def _summary(each: Comparison) -> str:
    judged = {None: "", True: ": held", False: ": not held"}[each.holds]
    return f"{each.held} of {len(each.lines)} times within a factor of 2 (! is not), typically {each.typical:.2f}{judged}"


def _summarized(each: Comparison) -> tuple[str, ...]:
    judged = {None: each.experiment.role, True: "prediction, held", False: "prediction, not held"}[each.holds]
    return (each.experiment.name, each.experiment.title, judged, f"{each.held} of {len(each.lines)}", f"{each.typical:.2f}")


def _json(found: Sequence[Comparison], costs: CostProfile) -> str:
    def line(each: Line) -> dict[str, Any]:
        return {**each._asdict(), "factor": each.factor, "holds": each.holds}

    out = {
        "schema": SCHEMA,
        "costs": {"name": costs.name, "title": costs.title, "guesses": list(costs.guesses)},
        "experiments": [
            {
                **{key: value for key, value in each.experiment._asdict().items() if key != "runs"},
                "times": [line(one) for one in each.lines],
                "counts": [line(one) for one in each.counts],
                "typical": each.typical,
                "holds": each.holds,
            }
            for each in found
        ],
        "verdict": verdict(found),
    }
    return json.dumps(out, indent=1, allow_nan=False) + "\n"
