"""The figures of a profile: one list from which the table, the Markdown and the JSON are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spte._version import __version__
from spte.cost import CostProfile
from spte.platform import PAGE_SIZE
from spte.profile.estimate import RowEstimate, estimate
from spte.profile.report import HARVEST, Row, Threads
from spte.profile.workload import Workload

SCHEMA = "spte-profile/2"


class Metric(NamedTuple):
    """One figure of a row: JSON key with the unit, label, how to get it, whether to show it when it is 0, and the band around it."""

    key: str
    label: str
    value: Callable[[Row], float | None]
    always: bool = True
    band: Callable[[Row], tuple[float, float]] | None = None

    def text(self, row: Row) -> str:
        """Return the figure of `row` as tables show it."""
        spelled = spell(self.value(row))
        return spelled if self.band is None else f"{spelled} ({' to '.join(map(spell, self.band(row)))})"


class Section(NamedTuple):
    """Figures of one kind: what kind, whether they are to be compared with the first column, and the figures."""

    title: str
    exact: bool
    metrics: tuple[Metric, ...]


def _count(key: str, label: str, name: str, *kinds: str, always: bool = True) -> Metric:
    return Metric(key, label, lambda row: row.count(name, *kinds), always)


def _leafs(key: str, label: str, when: str, name: str, *, always: bool = True) -> Metric:
    return Metric(key, label, lambda row: row.leafs[when][name], always)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


COUNTS = (
    Metric("pages_written", "pages written", lambda row: row.written),
    Metric("pages_reported", "pages reported", lambda row: row.reported),
    Metric("pages_initially_set", "pages initially set, not written", lambda row: row.initially_set, always=False),
    Metric("pages_over_reported", "pages over-reported", lambda row: row.over_reported),
    Metric("pages_lost", "pages lost", lambda row: row.lost),
    _count("populate_faults_slow", "faults, populate", "faults_slow", "populate"),
    _count("faults_fast", "faults, fast", "faults_fast"),
    _count("faults_slow", "faults, slow", "faults_slow"),
    _count("exits", "VM exits", "exits"),
    _count("pml_entries", "PML entries", "pml_entries"),
    _count("pml_full_exits", "PML full exits", "pml_full"),
    _count("ring_full_exits", "ring full exits", "ring_full", always=False),
    _count("sptes_written_enable", "SPTEs written, enable", "sptes_written", "enable"),
    _count("sptes_written_guest", "SPTEs written, faults", "sptes_written", "dirty"),
    _count("sptes_written_harvest", "SPTEs written, harvest", "sptes_written", *HARVEST),
    _count("sptes_written_disable", "SPTEs written, disable", "sptes_written", "disable"),
    _count("flushes", "TLB flushes", "flushes"),
    _count("splits_2m", "splits of 2 MiB", "splits_2m"),
    _count("splits_1g", "splits of 1 GiB", "splits_1g", always=False),
    _leafs("huge_2m_populated", "2 MiB pages, populated", "populate", "pages_2m"),
    _leafs("huge_2m_logging", "2 MiB pages, last harvest", "logging", "pages_2m"),
    _leafs("huge_2m_disabled", "2 MiB pages, disabled", "disable", "pages_2m"),
    _leafs("huge_1g_populated", "1 GiB pages, populated", "populate", "pages_1g", always=False),
    _leafs("huge_1g_logging", "1 GiB pages, last harvest", "logging", "pages_1g", always=False),
    _leafs("huge_1g_disabled", "1 GiB pages, disabled", "disable", "pages_1g", always=False),
)
"""Exact. Unless the label says when, a count is the sum from enabling to disabling, without populate."""

RATES = (
    Metric("dirty_rate_pages_per_s", "dirty rate, pages/s", lambda row: row.dirty_pages_per_s),
    Metric("dirty_rate_mb_per_s", "dirty rate, MB/s", lambda row: _scaled(row.dirty_pages_per_s, PAGE_SIZE / 1e6)),
)
"""Exact: pages written by the workload's own clock (1 MB = 10^6 bytes)."""

MEASURED = (
    Metric("harvest_mpages_per_s", "harvest, Mpages/s", lambda row: _scaled(row.harvest_pages_per_s, 1e-6)),
    Metric("harvest_ns_per_page", "harvest, ns/page", lambda row: _per_page(row)),
    Metric("enable_ns_per_spte", "enable, ns/SPTE", lambda row: _scaled(row.enable_s_per_spte, 1e9)),
    Metric("guest_writes_per_s", "guest writes/s", lambda row: row.guest_accesses_per_s),
)
"""Measured on this machine: harvest a page reported, enable an SPTE written, guest writes while logging."""


def _beside(key: str, label: str, value: Callable[[Threads], float | None], *, always: bool = True) -> Metric:
    return Metric(key, label, lambda row: None if row.threads is None else value(row.threads), always)


def _timed(key: str, label: str, name: str, *, always: bool = True) -> Metric:
    return _beside(key, label, lambda threads: threads.counts[name], always=always)


THREADS_EXACT = (_beside("pages_lost", "pages lost, vCPUs on threads", lambda threads: threads.lost),)
"""Only with vCPUs on threads; 0 whatever the timing."""

THREADS_COUNTS = (
    _beside("harvests", "~ harvests", lambda threads: threads.harvests),
    _beside("guest_writes", "~ guest writes during harvest", lambda threads: threads.writes),
    _beside("pages_reported", "~ pages reported", lambda threads: threads.reported),
    _timed("faults_fast", "~ faults, fast", "faults_fast"),
    _timed("faults_slow", "~ faults, slow", "faults_slow"),
    _timed("exits", "~ VM exits", "exits"),
    _timed("pml_entries", "~ PML entries", "pml_entries"),
    _timed("ring_full_exits", "~ ring full exits", "ring_full", always=False),
    _timed("sptes_written", "~ SPTEs written", "sptes_written"),
    _timed("flushes", "~ TLB flushes", "flushes"),
    _timed("splits_2m", "~ splits of 2 MiB", "splits_2m"),
)
"""Counts of vCPUs on threads, which depend on timing: while logging was on, and until it was disabled."""

THREADS_MEASURED = (
    _beside("guest_writes_per_s_during_harvest", "guest writes/s during harvest", lambda threads: threads.writes_per_s),
    _beside("harvest_wait_us", "harvest waits for vCPUs, us", lambda threads: _scaled(threads.wait_s_per_harvest, 1e6)),
    _beside("disable_ms_beside_vcpus", "disable beside vCPUs, ms", lambda threads: _scaled(threads.disable_s, 1e3), always=False),
)
"""Measured on this machine with vCPUs on threads."""


def _per_page(row: Row) -> float | None:
    rate = row.harvest_pages_per_s
    return None if rate is None else 1e9 / rate


_ESTIMATED: tuple[tuple[str, str, Callable[[RowEstimate], float]], ...] = (
    ("guest_stall_ms_per_epoch", "guest stall, ms/epoch", lambda e: e.stall / 1e6),
    ("vmm_ms", "VMM time, ms", lambda e: e.vmm / 1e6),
    ("mmu_lock_longest_hold_us", "mmu_lock, longest hold, us", lambda e: e.hold / 1e3),
)


def estimates(rows: Sequence[Row], profile: CostProfile, *, band: bool) -> tuple[Metric, ...]:
    """Return the estimated figures of `rows` at the costs of `profile`, with `band` also at its lowest and highest."""
    at = {id(row): tuple(estimate(row, costs) for costs in (profile.costs, profile.low, profile.high)) for row in rows}

    def metric(key: str, label: str, value: Callable[[RowEstimate], float]) -> Metric:
        def ends(row: Row) -> tuple[float, float]:
            return value(at[id(row)][1]), value(at[id(row)][2])

        return Metric(key, label, lambda row: value(at[id(row)][0]), band=ends if band else None)

    return tuple(metric(*each) for each in _ESTIMATED)


def sections(rows: Sequence[Row], profile: CostProfile | None = None, *, band: bool = False) -> tuple[Section, ...]:
    """Return all figures of `rows` by kind; estimates only with a cost profile, and those of threads only if there are any."""
    beside = any(row.threads for row in rows)
    found = [Section("exact", True, COUNTS + RATES + THREADS_EXACT * beside)]
    if profile is not None:
        found.append(Section("estimated", False, estimates(rows, profile, band=band)))
    if beside:
        found.append(Section("depends on timing", False, THREADS_COUNTS))
    return *found, Section("measured here", False, MEASURED + THREADS_MEASURED * beside)


def shown(metrics: Sequence[Metric], rows: Sequence[Row]) -> list[Metric]:
    """Return the metrics that are worth a line in a table of `rows`."""
    return [m for m in metrics if m.always or any(m.value(row) for row in rows)]


def spell(value: float | None) -> str:
    """Return a figure as tables show it: counts whole, others with three significant digits or more."""
    if value is None:
        return "n/a"
    if isinstance(value, float) and value >= 1e6:
        return f"{value / 1e6:,.4g} M"
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


class Report(NamedTuple):
    """All that one call of `spte profile` has to tell."""

    workload: Workload
    rows: Sequence[Row]
    notes: Sequence[str]
    profile: CostProfile | None
    band: bool


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON values; `counts` and `rates` are exact, `measured` holds for this machine, `estimated` by the costs.

    In `threads` a count of `depends_on_timing` may be another in the next run.
    """
    profile = report.profile
    metrics = estimates(report.rows, profile, band=report.band) if profile else ()
    return {
        "schema": SCHEMA,
        "spte_version": __version__,
        "workload": report.workload.describe(),
        "costs": {"name": profile.name, "title": profile.title, "guesses": list(profile.guesses)} if profile else None,
        "notes": list(report.notes),
        "rows": [_row(row, metrics) for row in report.rows],
    }


def _row(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    times = None if row.t_ns is None else [int(t) for t in row.t_ns]
    return {
        **row.column.names,
        "counts": {m.key: m.value(row) for m in COUNTS},
        "rates": {m.key: m.value(row) for m in RATES},
        "estimated": _estimated(row, metrics) if metrics else None,
        "measured": {m.key: m.value(row) for m in MEASURED},
        "threads": None if row.threads is None else _threads(row, row.threads),
        "phases": [
            {"name": p.name, "kind": p.kind, "iteration": p.iteration, "counts": p.counts, "measured_s": p.seconds}
            for p in row.phases
        ],
        "epochs": [
            {
                "t_ns": times[i : i + 2] if times else None,
                "pages_written": e.written,
                "pages_reported": e.reported,
                "pages_initially_set": e.initially_set,
                "pages_over_reported": e.over_reported,
                "pages_lost": e.lost,
                "first_lost_gfn": e.first_lost,
            }
            for i, e in enumerate(row.epochs)
        ],
        "leafs": row.leafs,
    }


def _threads(row: Row, threads: Threads) -> dict[str, Any]:
    return {
        **{m.key: m.value(row) for m in THREADS_EXACT},
        "first_lost_gfn": threads.first_lost,
        "vcpus_side_by_side": threads.vcpus_beside,
        "harvests_beside_vcpus": threads.harvests_beside,
        "depends_on_timing": {m.key: m.value(row) for m in THREADS_COUNTS},
        "measured": {m.key: m.value(row) for m in THREADS_MEASURED},
    }


def _estimated(row: Row, metrics: Sequence[Metric]) -> dict[str, Any]:
    return {m.key: m.value(row) if m.band is None else {"value": m.value(row), "band": list(m.band(row))} for m in metrics}
