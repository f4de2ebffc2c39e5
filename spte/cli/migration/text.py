"""Migrations as text: rounds, how one ended, and many of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spte.cli.migration.options import name_of, spelled
from spte.cli.params import spell_bandwidth, spell_size, spell_time
from spte.cli.text import columns, pipes
from spte.migrate.plan import Plan
from spte.migrate.report import Outcome, Round
from spte.platform import PAGE_SIZE

Axis = tuple[str, tuple[Any, ...]]
Figures = Mapping[str, Any]
FIRST, LAST = 8, 4
"""Of many rounds so many are shown from the beginning and the end."""
STALL = "guest stall"
HEADER = ("round", "began", "took", "sent", "dirtied", "remaining", STALL, "throttle")


def ns(value: float) -> str:
    """Return a time in ns as it is read."""
    return spell_time(value / 1e9) if value else "0"


def title(plan: Plan, cost: str | None, varied: Sequence[str] = ()) -> str:
    """Return two lines: what the guest runs, and the settings, without those that vary."""
    work = plan.workload
    settings = {
        "memory": spell_size(work.npages * PAGE_SIZE),
        "backing": f"on {work.backing}",
        "vcpus": f"{work.vcpus} vCPU{'s' * (work.vcpus > 1)}{', L2' * plan.nested}",
        "platform": plan.platform,
        "policy": f"policy {plan.policy}",
        "log": f"log {plan.log}",
        "throttle": f"throttle {plan.throttle}",
        "cost": f"costs {cost or 'none'}",
        "bandwidth": spell_bandwidth(plan.bandwidth),
        "downtime_ns": f"downtime at most {ns(plan.downtime_ns)}",
    }
    return f"{work.trace.command[:100]}\n" + ", ".join(text for key, text in settings.items() if key not in varied)


def rounds(plan: Plan, outcome: Outcome, *, markdown: bool = False) -> str:
    """Return a table of the rounds, the middle of many left out; the guest's stall only where there are costs."""
    shown: Sequence[Round] = outcome.rounds
    hidden = len(shown) - FIRST - LAST
    lines = [_cells(one) for one in (shown if hidden <= 0 else (*shown[:FIRST], *shown[-LAST:]))]
    if hidden > 0:
        lines.insert(FIRST, ("...", f"{hidden} round{'s' * (hidden != 1)}", *[""] * (len(HEADER) - 2)))
    kept = [i for i, name in enumerate(HEADER) if name != STALL or plan.costs is not None]
    return table([HEADER[i] for i in kept], [[line[i] for i in kept] for line in lines], markdown=markdown)


def _cells(one: Round) -> tuple[str, ...]:
    return (
        str(one.index), ns(one.start_ns), ns(one.duration_ns), f"{one.sent:,}", "-" if one.dirtied is None else f"{one.dirtied:,}",
        f"{one.remaining:,}", ns(one.stall_ns or 0), throttled(one.throttle_percent, one.dirty_limit),
    )  # fmt: skip


def verdict(plan: Plan, outcome: Outcome, *, markdown: bool = False) -> list[str]:
    """Return how it ended: the verdict, what it took, and what is left on the source; in Markdown a list."""
    source = outcome.source
    stall = "" if outcome.stall_ns is None else f", estimated guest stall {ns(outcome.stall_ns)}"
    if outcome.downtime is None:
        first = f"did not converge: cancelled after {ns(outcome.total_ns)}"
    else:
        parts = outcome.downtime
        first = (
            f"converged: total time {ns(outcome.total_ns)}, downtime {ns(parts.total_ns)} "
            f"(last harvest {ns(parts.harvest_ns)}, pages {ns(parts.pages_ns)}, fixed {ns(parts.fixed_ns)})"
        )
        if parts.total_ns > plan.downtime_ns:
            first += f", more than the {ns(plan.downtime_ns)} allowed: the guest wrote during the harvest before"
    rounds_ = f"{len(outcome.rounds)} round{'s' * (len(outcome.rounds) != 1)}"
    left = (
        f"logging off: {source.logging_slots} slots log, {source.pending} pages pending, 2 MiB pages {source.huge_before} before, "
        f"{source.huge_logging} while logging, {source.huge_after} back after {source.refaults} faults"
    )
    return [f"{'- ' * markdown}{line}" for line in (first, f"sent {outcome.bytes_sent / 1e6:,.1f} MB in {rounds_}{stall}", left)]


def lost_line(outcome: Outcome) -> str:
    """Return which pages did not arrive."""
    return f"{len(outcome.lost)} pages arrived in an older version than the source has, the first of them gfn {outcome.lost[0]}"


def short(one: Figures) -> str:
    """Return how it ended in a few characters: total time and downtime, or that it did not."""
    return f"{ns(one['total_ns'])} ({ns(one['down_ns'])})" if one["converged"] else "no"


def grid(axes: Sequence[Axis], figures: Sequence[Figures], *, markdown: bool = False) -> str:
    """Return a map of two axes: the first one's values from top to bottom, the second one's from left to right."""
    (row_key, row_values), (key, values) = axes
    header = (f"{name_of(row_key)} \\ {name_of(key)}", *(spelled(key, value) for value in values))
    ended = iter(figures)
    lines = [(spelled(row_key, value), *(short(next(ended)) for _ in values)) for value in row_values]
    return table(header, lines, markdown=markdown)


def listing(keys: Sequence[str], points: Sequence[Mapping[str, Any]], figures: Sequence[Figures], *, markdown: bool = False) -> str:
    """Return a line for each point: its settings of `keys`, and how it ended; the guest's stall only where there are costs."""
    header = (*map(name_of, keys), "converged", "total", "downtime", "sent", "rounds", STALL, "throttled")
    lines = [(*(spelled(key, point[key]) for key in keys), *_summary(one)) for point, one in zip(points, figures, strict=True)]
    kept = [i for i, name in enumerate(header) if name != STALL or any(one["stall_ns"] is not None for one in figures)]
    return table([header[i] for i in kept], [[line[i] for i in kept] for line in lines], markdown=markdown)


def _summary(one: Figures) -> tuple[str, ...]:
    downtime, stall = ("-" if one[name] is None else ns(one[name]) for name in ("down_ns", "stall_ns"))
    return (
        "yes" if one["converged"] else "no", ns(one["total_ns"]), downtime, f"{one['bytes_sent'] / 1e6:,.0f} MB", str(one["rounds"]),
        stall, throttled(one["throttle_percent"], one["dirty_limit"]),
    )  # fmt: skip


def throttled(percent: int, limit: int | None) -> str:
    """Return how much a throttle slows vCPUs down: the share of time that they sleep, or the bytes that each may dirty."""
    return f"{limit / 1e6:.3g} MB/s" if limit is not None else f"{percent} %" if percent else "-"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """Return a table: the first column to the left, the others to the right."""
    return "\n".join((pipes if markdown else columns)((header, *lines), left=1))
