"""Combinations that KVM itself makes useless or dear, each explained in one line where it shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from spte.profile.columns import INITIALLY_SET, labels
from spte.profile.report import Row, Threads


def notes(rows: Sequence[Row], clear_chunk: int | None = None) -> list[str]:
    """Return what explains the figures of `rows`, a line a column and reason."""
    names = [", ".join(label) for label in labels([row.column for row in rows])]
    return [f"{name}: {why}" for name, row in zip(names, rows, strict=True) for why in _reasons(row, clear_chunk)]


def _reasons(row: Row, clear_chunk: int | None) -> Iterator[str]:
    log = row.column.log
    if log.ring_bytes and log.manual == INITIALLY_SET:
        yield (
            "with initially-set, enabling arms no page, in KVM too: the first CLEAR of each does, and a dirty ring has no CLEAR; "
            "take ring alone"
        )
    if row.initially_set:
        yield f"initially-set reports the whole memory once; {row.initially_set:,} of these pages were not written"
    twice = _marked_twice(row)
    if twice:
        yield (
            f"huge pages are split in faults, which mark the page, and PML logs it once more: {twice:,} marks of pages that were marked "
            "already; take eager_page_split=Y"
        )
    if row.threads is not None:
        yield from _turns(row.threads)
    if clear_chunk is not None and "clear" not in log.harvest:
        yield "--clear-chunk changes nothing: there is no CLEAR; take --log manual or initially-set"


def _turns(threads: Threads) -> Iterator[str]:
    if not threads.vcpus_beside:
        yield "vCPUs on threads take turns, with harvests too: KVM's shadow MMU holds mmu_lock for writing"
    elif not threads.harvests_beside:
        yield "each GET and CLEAR waits until all vCPUs have stopped: with initially-set, CLEAR may split huge pages"


def _marked_twice(row: Row) -> int:
    """Return how many pages a fault marked and PML logged in one and the same epoch."""
    guest = [phase.counts for phase in row.phases if phase.kind == "dirty"]
    return sum(
        max(0, counts["dirty_marks"] - epoch.written)
        for counts, epoch in zip(guest, row.epochs, strict=True)
        if counts["pml_entries"] and counts["faults_fast"] + counts["faults_slow"]
    )
