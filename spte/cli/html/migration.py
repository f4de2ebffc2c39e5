"""Reports of migrations: one, a grid, a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from spte.cli.html.page import Cell, Section, bars, figure, points, steps
from spte.cli.html.traces import pages_over_time
from spte.cli.migration.options import name_of, spelled
from spte.cli.migration.text import STALL, Axis, Figures, ns, short, throttled
from spte.migrate.plan import Plan
from spte.migrate.report import Outcome


def one(plan: Plan, outcome: Outcome) -> list[Section]:
    """Return the sections of one migration."""
    rounds = outcome.rounds
    bounds = [each.start_ns / 1e9 for each in rounds] + [(rounds[-1].start_ns + rounds[-1].duration_ns) / 1e9]
    pages = figure("time, s", "4 KiB pages")
    steps(pages, 0, "sent in the round", bounds, [each.sent for each in rounds])
    steps(pages, 1, "dirtied meanwhile", bounds, [each.dirtied for each in rounds])
    points(pages, 2, "remaining at its end", bounds[1:], [each.remaining for each in rounds], [f"round {each.index}" for each in rounds])
    about = "A round sends what the one before left; it converges when little is left."
    sections = [Section("Remaining and dirty per round", about, pages)]
    lengths = [later - earlier or 1.0 for earlier, later in pairwise(bounds)]
    slowed = figure("time, s", "% of the time")
    steps(slowed, 0, "throttle: every vCPU sleeps", bounds, [each.throttle_percent for each in rounds])
    if plan.costs is not None:
        vcpus = plan.workload.vcpus
        steps(slowed, 1, "stall by dirty logging, estimated", bounds, [
            (each.stall_ns or 0) / 1e7 / length / vcpus for each, length in zip(rounds, lengths, strict=True)
        ])  # fmt: skip
    sections.append(Section("Stall over time", "What takes the guest's time while it is migrated.", slowed))
    if any(each.dirty_limit is not None for each in rounds):
        limit = figure("time, s", "MB/s")
        steps(limit, 0, "dirty limit of a vCPU", bounds, [None if each.dirty_limit is None else each.dirty_limit / 1e6 for each in rounds])
        sections.append(Section("Dirty limit over time", "A vCPU that dirties more sleeps until its next page is due.", limit))
    if plan.costs is not None:
        sections.append(_costs(outcome))
    return [*sections, pages_over_time(plan.workload.trace), Section("Rounds", rows=_rounds(plan, outcome))]


def _costs(outcome: Outcome) -> Section:
    costs = figure("round", "ms, estimated", barmode="stack")
    names = [str(each.index) for each in outcome.rounds]
    bars(costs, 0, "guest stall", names, [(each.stall_ns or 0) / 1e6 for each in outcome.rounds])
    bars(costs, 1, "VMM, in ioctls", names, [(each.vmm_ns or 0) / 1e6 for each in outcome.rounds])
    return Section("Cost by phase", f"Enabling took the VMM {ns(outcome.enable_ns or 0)} before round 1.", costs)


def _rounds(plan: Plan, outcome: Outcome) -> list[list[Cell | str]]:
    head: list[Cell | str] = ["round", "began", "took", "sent", "dirtied", "remaining", "throttle"]
    rows = [head + (["guest stall", "VMM"] if plan.costs is not None else [])]
    for each in outcome.rounds:
        row: list[Cell | str] = [
            Cell(str(each.index), each.index), _time(each.start_ns), _time(each.duration_ns), _number(each.sent), _number(each.dirtied),
            _number(each.remaining), _throttle(each.throttle_percent, each.dirty_limit),
        ]  # fmt: skip
        rows.append(row + ([_time(each.stall_ns), _time(each.vmm_ns)] if plan.costs is not None else []))
    return rows


def many(keys: Sequence[str], settings: Sequence[Mapping[str, Any]], figures: Sequence[Figures], axes: Sequence[Axis]) -> list[Section]:
    """Return the sections of many migrations, whose `settings` of `keys` differ; two `axes` make a map."""
    sections = [_map(axes, figures)] if len(axes) == 2 else []
    told = [", ".join(f"{name_of(key)} {spelled(key, point[key])}" for key in keys) for point in settings]
    good = [i for i, each in enumerate(figures) if each["converged"]]
    times = figure("total time, s", "downtime, ms", xaxis_type="log", yaxis_type="log")
    x, y = ([figures[i][name] / scale for i in good] for name, scale in (("total_ns", 1e9), ("down_ns", 1e6)))
    points(times, 0, "converges", x, y, [told[i] for i in good])
    never = len(figures) - len(good)
    text = f"{len(good)} of {len(figures)} converge" + (f"; the other {never} were cancelled and have no place here." * bool(never) or ".")
    sections.append(Section("Total time and downtime", text, times))
    estimated = any(each["stall_ns"] is not None for each in figures)
    if estimated:
        stalls = figure("point", "guest stall, ms, estimated")
        bars(stalls, 1, "guest stall", told, [(each["stall_ns"] or 0) / 1e6 for each in figures])
        stalls.update_xaxes(showticklabels=len(told) <= 24)
        sections.append(Section("Guest stall", "Time that dirty logging takes from all vCPUs, until the guest moves or gives up.", stalls))
    head = [*map(name_of, keys), "converged", "total", "downtime", "MB sent", "rounds", STALL, "throttle", "pages lost"]
    rows: list[list[Cell | str]] = [[*head]]
    for point, each in zip(settings, figures, strict=True):
        rows.append([
            *(Cell(spelled(key, point[key]), point[key]) for key in keys), "yes" if each["converged"] else "no", _time(each["total_ns"]),
            _time(each["down_ns"]), _number(round(each["bytes_sent"] / 1e6)), _number(each["rounds"]), _time(each["stall_ns"]),
            _throttle(each["throttle_percent"], each["dirty_limit"]), _number(each["lost_pages"]),
        ])  # fmt: skip
    if not estimated:
        at = head.index(STALL)
        rows = [row[:at] + row[at + 1 :] for row in rows]
    return [*sections, Section("All of them", rows=rows)]


def _map(axes: Sequence[Axis], figures: Sequence[Figures]) -> Section:
    (row_key, row_values), (key, values) = axes
    width = len(values)
    ended = [figures[i * width : (i + 1) * width] for i in range(len(row_values))]
    shown = figure(name_of(key), name_of(row_key), height=140 + 60 * len(row_values))
    shown.add_heatmap(
        x=[spelled(key, value) for value in values], y=[spelled(row_key, value) for value in row_values],
        z=[[each["total_ns"] / 1e9 if each["converged"] else None for each in row] for row in ended],
        text=[[short(each) if each["converged"] else "" for each in row] for row in ended],
        texttemplate="%{text}", colorscale=[[0, "#f4f8fb"], [1, "#9ec5de"]], colorbar={"title": {"text": "total, s"}}, hoverongaps=False,
        xgap=2, ygap=2,
    )  # fmt: skip
    for row, outcomes in enumerate(ended):
        for column, each in enumerate(outcomes):
            if not each["converged"]:  # a gap of the map has no text of its own
                shown.add_annotation(x=column, y=row, text="does not converge", showarrow=False)
    shown.update_xaxes(type="category")
    shown.update_yaxes(type="category", autorange="reversed")
    name = f"{name_of(row_key).capitalize()} against {name_of(key)}"
    return Section(name, "Total time, and in brackets the downtime, where it converges.", shown)


def _time(value: int | None) -> Cell:
    return Cell("-" if value is None else ns(value), value)


def _throttle(percent: int, limit: int | None) -> Cell:
    return Cell(throttled(percent, limit), percent if limit is None else limit)


def _number(value: int | None) -> Cell:
    return Cell("-" if value is None else f"{value:,}", value)
