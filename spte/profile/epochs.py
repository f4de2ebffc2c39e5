"""One record an epoch and column: what was written and reported, what it took, and on demand what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from spte.cost import CostProfile
from spte.profile.estimate import estimate
from spte.profile.report import HARVEST, Row

_COUNTS = ("exits", "faults_fast", "faults_slow", "pml_entries", "pml_full", "ring_full", "splits_2m", "splits_1g", "flushes")


def epochs(rows: Sequence[Row], profile: CostProfile | None = None, *, band: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the figures of each epoch by name, column by column; estimates, in ns, only with a cost profile, `band`: at its ends too."""
    costs = {"": profile.costs} if profile else {}
    if profile and band:
        costs |= {"low_": profile.low, "high_": profile.high}
    for row in rows:
        estimated = {which: estimate(row, each).epochs for which, each in costs.items()}
        for i in range(len(row.epochs)):
            values = _exact(row, i)
            for which, found in estimated.items():
                stall, vmm, hold = (f"estimated_{name}_{which}ns" for name in ("guest_stall", "vmm", "mmu_lock_longest_hold"))
                values |= {stall: found[i].stall, vmm: found[i].vmm, hold: found[i].hold}
            yield values


def _exact(row: Row, index: int) -> dict[str, Any]:
    epoch, phases = row.epochs[index], row.epoch_phases(index)

    def count(name: str, *kinds: str) -> int:
        return sum(phase.counts[name] for phase in phases if not kinds or phase.kind in kinds)

    return {
        **row.column.names,
        "epoch": index,
        "start_ns": None if row.t_ns is None else int(row.t_ns[index]),
        "end_ns": None if row.t_ns is None else int(row.t_ns[index + 1]),
        "pages_written": epoch.written,
        "pages_reported": epoch.reported,
        "pages_initially_set": epoch.initially_set,
        "pages_over_reported": epoch.over_reported,
        "pages_lost": epoch.lost,
        **{name: count(name) for name in _COUNTS},
        "sptes_written_guest": count("sptes_written", "dirty"),
        "sptes_written_harvest": count("sptes_written", *HARVEST),
    }
