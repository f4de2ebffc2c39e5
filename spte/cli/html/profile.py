"""Reports of `spte profile`, `spte papers` and `spte patches`."""

from __future__ import annotations

from collections.abc import Sequence

from spte.cli.html.page import Cell, Section, bars, figure, steps
from spte.cli.html.traces import pages_over_time
from spte.cli.metrics import Metric, Report, sections, shown
from spte.cli.series import change, recorded_text
from spte.papers import Comparison
from spte.patches.groups import Group
from spte.patches.recorded import recorded
from spte.patches.trial import COUNTS, Outcome
from spte.profile.columns import labels
from spte.profile.estimate import estimate, guest_phase, vmm_phase
from spte.profile.report import HARVEST, Row
from spte.profile.workload import TraceWorkload

PHASES = (("enable", ("enable",)), ("faults", ("dirty",)), ("harvest", HARVEST), ("disable", ("disable",)))


def profile(report: Report) -> list[Section]:
    """Return the sections of a profile: a column of its table is a bar or a line here."""
    names = [" ".join(label) for label in labels([row.column for row in report.rows])]
    written = figure("", "SPTEs written", barmode="stack")
    for number, (name, kinds) in enumerate(PHASES):
        bars(written, number, name, names, [row.count("sptes_written", *kinds) for row in report.rows])
    parts = [Section("Cost by phase", "SPTEs that each phase writes: exact.", written)]
    if report.profile is not None:
        parts += _estimated(report, names)
    pages, first = figure("", "4 KiB pages"), report.rows[0]
    bounds, unit = _bounds(first)
    steps(pages, 0, "written", bounds, [epoch.written for epoch in first.epochs])
    pages.update_xaxes(title_text=unit)
    parts.append(Section("Pages written in each epoch", "The same for all columns.", pages))
    if isinstance(report.workload, TraceWorkload):
        parts.append(pages_over_time(report.workload.trace))
    for section in sections(report.rows, report.profile, band=report.band):
        rows: list[list[Cell | str]] = [["figure", *names]]
        rows += [_figure(metric, report.rows) for metric in shown(section.metrics, report.rows)]
        parts.append(Section(f"Figures: {section.title}", rows=rows))
    return parts


def _figure(metric: Metric, rows: Sequence[Row]) -> list[Cell | str]:
    return [metric.label, *(Cell(metric.text(row), metric.value(row)) for row in rows)]


def _estimated(report: Report, names: Sequence[str]) -> list[Section]:
    assert report.profile is not None
    costs = report.profile.costs
    stacked = figure("", "ms, estimated", barmode="stack")
    for number, (name, kinds) in enumerate(PHASES):
        bars(stacked, number, name, names, [_phase_ms(row, kinds, report) for row in report.rows])
    over_time = figure("", "guest stall, ms in the epoch")
    for number, (name, row) in enumerate(zip(names, report.rows, strict=True)):
        bounds, unit = _bounds(row)
        steps(over_time, number, name, bounds, [each.stall / 1e6 for each in estimate(row, costs).epochs])
        over_time.update_xaxes(title_text=unit)
    told = f"At the costs of {report.profile.name}: {report.profile.title}."
    return [
        Section("Estimated cost by phase", f"Time that vCPUs lose and that the VMM is in ioctls. {told}", stacked),
        Section("Stall over time", f"CPU time that all vCPUs lose in each epoch, estimated. {told}", over_time),
    ]


def _phase_ms(row: Row, kinds: Sequence[str], report: Report) -> float:
    assert report.profile is not None
    costs, phases = report.profile.costs, [phase for phase in row.phases if phase.kind in kinds]
    guest = sum(sum(guest_phase(row, phase, costs)) for phase in phases if phase.vcpus)
    calls = [vmm_phase(row, phase, costs) for phase in phases]
    return (guest + sum(each.vmm + each.stall for each in calls)) / 1e6


def _bounds(row: Row) -> tuple[list[float], str]:
    """Return the bounds of the epochs and their unit."""
    if row.t_ns is None or row.t_ns[-1] == row.t_ns[0]:
        return [i + 0.5 for i in range(len(row.epochs) + 1)], "iteration"
    return [float(t) / 1e9 for t in row.t_ns], "time, s"


def patches(groups: Sequence[Group]) -> list[Section]:
    """Return a table of what each patch changes, and one of each group that is no patch."""
    parts = []
    for group in groups:
        names = [name for name in COUNTS if any(seen[name] for outcome in group.outcomes for seen in outcome.seen)]
        rows: list[list[Cell | str]] = [["scenario", *(name.replace("_", " ") for name in names), "recorded", "as specified"]]
        rows += [_scenario(outcome, names) for outcome in group.outcomes]
        title = f"Patch {group.patch.number}: {group.patch.title}" if group.patch is not None else group.title
        parts.append(Section(title, "" if group.outcomes else "No behaviour to measure.", rows=rows if group.outcomes else ()))
    return parts


def _scenario(outcome: Outcome, names: Sequence[str]) -> list[Cell | str]:
    scenario = outcome.scenario
    counts = [change([seen[name] for seen in outcome.seen]) if outcome.seen else "" for name in names]
    told = "; ".join(map(recorded_text, recorded(scenario.name)))
    return [f"{scenario.name}: {scenario.claim}", *counts, told, "yes" if outcome.as_specified else "NO"]


def papers(found: Sequence[Comparison]) -> list[Section]:
    """Return for each experiment bars of published beside estimated times, and their table."""
    parts = []
    for each in found:
        times = figure("", "s", barmode="group")
        names = [f"{line.run}: {line.what}" for line in each.lines]
        bars(times, 0, "published", names, [line.published for line in each.lines])
        bars(times, 1, "estimated", names, [line.estimated for line in each.lines])
        rows: list[list[Cell | str]] = [["run", "phase", "published, s", "estimated, s", "estimated/published"]]
        rows += [
            [line.run, line.what, *(Cell(f"{x:.4g}", x) for x in (line.published, line.estimated)), Cell(f"{line.factor:.2f}", line.factor)]
            for line in each.lines
        ]
        about = each.experiment
        parts.append(Section(f"{about.name}, {about.role}: {about.title}", f"{about.source}; {about.date}; {about.machine}", times, rows))
    return parts
