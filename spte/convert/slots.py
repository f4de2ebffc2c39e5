"""The guest's memslots, and the page space of a trace in which they lie one behind the other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from spte._arguments import integer
from spte.convert.scan import Mask, Uint64Array
from spte.platform import PAGE_SIZE
from spte.trace import MAX_NPAGES, PAGES_PER_2M, TraceError

MAX_ID = (1 << 32) - 1
AS_SHIFT = 16
"""A slot is named by its address space in the upper and its id in the lower 16 bits."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """A memslot: `gpa` and `size` in bytes, multiples of 4096; `id` as KVM has it, None: its place among those given."""

    gpa: int
    size: int
    id: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpa", "size", "id"):
            if name != "id" or self.id is not None:
                integer(getattr(self, name), name, TraceError)


class Slots:
    """Memslots and where their pages lie in the trace.

    The 2 MiB regions of guest memory in which a slot lies follow one another in the trace, in the order of their addresses
    and without the holes between them. A region stays whole and aligned, so that what could be one 2 MiB page still can.
    Slots of the other address space (SMM: ids from 2^16 on) may overlap those of the first, as they do in KVM.

    Parameters
    ----------
    slots : sequence of Slot
        Which slots there are, in the order in which their bitmaps come.

    Raises
    ------
    TraceError
        If a slot is no whole number of pages, two overlap or have one id, or all are too large together.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.given = [dataclasses.replace(s, id=i if s.id is None else s.id) for i, s in enumerate(slots)]
        _check(self.given)
        ranges = [(slot.gpa // PAGE_SIZE, (slot.gpa + slot.size) // PAGE_SIZE) for slot in self.given]
        memory = _merged(ranges)
        regions = _merged([(first // PAGES_PER_2M, -(-end // PAGES_PER_2M)) for first, end in memory])
        self._first, self._end = np.array(memory, np.int64).T
        self._regions = np.array(regions, np.int64)[:, 0]
        sizes = [end - first for first, end in regions]
        self._starts = np.cumsum([0, *sizes[:-1]])
        self.npages = sum(sizes) * PAGES_PER_2M
        if self.npages > MAX_NPAGES:
            raise TraceError(f"the slots have {self.npages} pages with the rest of their 2 MiB regions; a trace has at most {MAX_NPAGES}")

    def start(self, slot: Slot) -> int:
        """Return the page of the trace at which `slot` begins."""
        return int(self.place(np.array([slot.gpa // PAGE_SIZE], np.uint64))[0][0])

    def by_id(self, slot_id: int) -> Slot | None:
        """Return the slot that KVM knows as `slot_id`, or None."""
        return next((slot for slot in self.given if slot.id == slot_id), None)

    def place(self, gfn: Uint64Array) -> tuple[Uint64Array, Mask]:
        """Return the page of the trace for each guest page of `gfn` that a slot holds, and which these are, bool."""
        at = gfn.astype(np.int64)
        memory = np.searchsorted(self._first, at, side="right") - 1
        inside = (memory >= 0) & (at < self._end[memory])
        region, page = np.divmod(at[inside], PAGES_PER_2M)
        run = np.searchsorted(self._regions, region, side="right") - 1
        return ((self._starts[run] + region - self._regions[run]) * PAGES_PER_2M + page).astype(np.uint64), inside

    def describe(self) -> list[dict[str, Any]]:
        """Return id, address, size and first page of each slot, for the trace's `meta`."""
        return [{"id": s.id, "gpa": s.gpa, "size": s.size, "page": self.start(s)} for s in self.given]


def _check(slots: Sequence[Slot]) -> None:
    for slot in slots:
        if slot.gpa < 0 or slot.gpa % PAGE_SIZE or slot.size <= 0 or slot.size % PAGE_SIZE or (slot.gpa + slot.size) >> 52:
            raise TraceError(
                f"slot {slot.gpa:#x}:{slot.size:#x}: address and size must be multiples of {PAGE_SIZE} below 2^52, the size above 0"
            )
    ids = [slot.id or 0 for slot in slots]
    if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) > MAX_ID:
        raise TraceError(f"slot ids {ids}: each is its own, from 0 to {MAX_ID}")
    ordered = sorted(slots, key=lambda slot: ((slot.id or 0) >> AS_SHIFT, slot.gpa))
    for low, high in itertools.pairwise(ordered):
        if (low.id or 0) >> AS_SHIFT == (high.id or 0) >> AS_SHIFT and low.gpa + low.size > high.gpa:
            raise TraceError(f"slot {low.gpa:#x}:{low.size:#x} overlaps the one at {high.gpa:#x}; KVM allows no overlap")


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return half-open ranges in order, those that touch or overlap as one."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((first, end))
    return merged
