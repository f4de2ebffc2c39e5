"""What every reader gives its writes to: by time or by epoch, as guest pages or as pages of the trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from spte._arguments import flag, instance, integer, items
from spte.convert.scan import Uint64Array
from spte.convert.slots import Slot, Slots
from spte.convert.source import Positions
from spte.platform import PAGE_SIZE
from spte.trace import Trace, TraceError
from spte.trace.build import INTERVAL_NS, check_interval, epochs_of
from spte.trace.collect import GFN_BITS, Collector
from spte.trace.model import MAX_NPAGES

UNITS = {"s": 9, "ms": 6, "us": 3, "ns": 0}
"""Unit of a time, and how many decimal digits it has down to ns."""
GFN_END = 1 << GFN_BITS
WAY_OUT = "--slot ID=GPA:SIZE (Slot in the library)"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the inputs do not say themselves; see `spte.convert.convert`."""

    interval_ns: int = INTERVAL_NS
    npages: int | None = None
    slots: Sequence[Slot] = ()
    addresses: bool = False
    time_unit: str | None = None
    squeeze: bool = False

    def __post_init__(self) -> None:
        check_interval(integer(self.interval_ns, "interval_ns", TraceError))
        if self.npages is not None and not 0 < integer(self.npages, "npages", TraceError) <= MAX_NPAGES:
            raise TraceError(f"{self.npages} pages; a guest has from 1 to {MAX_NPAGES}")
        for name in ("addresses", "squeeze"):
            flag(getattr(self, name), name)
        for slot in items(self.slots, "slots", "a list of spte.convert.Slot"):
            instance(slot, "slots", Slot, "a list of spte.convert.Slot")
        if self.time_unit is not None:
            instance(self.time_unit, "time_unit", str, f"one of {', '.join(UNITS)}")
        if self.slots and (self.npages is not None or self.squeeze):
            raise TraceError("slots say themselves how many pages there are and leave out the holes; give either them or pages, squeeze")
        if self.time_unit not in (None, *UNITS):
            raise TraceError(f"time unit {self.time_unit!r}; take one of {', '.join(UNITS)}")


class Writes:
    """Collects the writes of all inputs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.slots = Slots(options.slots) if options.slots else None
        self.meta: dict[str, Any] = {}
        self.notes: list[str] = []
        self.squeeze = options.squeeze
        self.npages: int | None = self.slots.npages if self.slots else options.npages
        self._collector = Collector()
        self._start: int | None = None
        self._outside = 0
        self._only_slot: int | None = None

    def at(self, t_ns: Positions, gfn: Uint64Array, error: Callable[[int, str], TraceError] | None = None) -> None:
        """Take writes of guest pages at times; the first one of all says where an epoch begins. `error` as for `of_slot`."""
        if not len(gfn):
            return
        if self._start is None:
            self._start = int(t_ns[0])
        if int(t_ns.min()) < self._start:
            self.note("times go back behind the first line's, at which an epoch begins; sort the lines by time to begin at the earliest")
        if error and self.slots is None:
            self._check_range(gfn, error)
        epoch = epochs_of(t_ns, self._start, self.options.interval_ns)
        if self.slots:
            gfn, inside = self.slots.place(gfn)
            epoch = epoch[inside]
            self._outside += int(np.count_nonzero(~inside))
        self._collector.add(epoch, gfn)

    def _check_range(self, gfn: Uint64Array, error: Callable[[int, str], TraceError]) -> None:
        """Refuse a page that the guest does not have, or that no trace holds unless it is squeezed."""
        end = self.options.npages or (GFN_END if self.squeeze else MAX_NPAGES)
        far = np.flatnonzero(gfn >= np.uint64(end))
        if len(far):
            way = f"the guest has {end}" if self.options.npages else f"a trace has at most {end}: name the guest's slots, or squeeze"
            raise error(int(far[0]), f"is page {int(gfn[far[0]]):#x}; {way}")

    def of_slot(self, slot: Uint64Array, offset: Uint64Array, error: Callable[[int, str], TraceError]) -> Uint64Array:
        """Return the guest page of each `offset`, in pages, in the slot that KVM knows as `slot`.

        Without slots there may be only one; its pages are then the guest's from 0 on. `error` makes the error for the
        write of an index.
        """
        gfn = offset.copy()
        for slot_id in np.unique(slot).tolist():
            mine = slot == slot_id
            at = int(np.flatnonzero(mine)[0])
            if self.slots is None:
                self._only_slot = slot_id if self._only_slot is None else self._only_slot
                if slot_id != self._only_slot:
                    raise error(at, f"is of slot {slot_id}, others are of slot {self._only_slot}; say where they lie with {WAY_OUT}")
                continue
            known = self.slots.by_id(slot_id)
            if known is None:
                raise error(at, f"is of slot {slot_id}, which was not given; say where it lies with {WAY_OUT}")
            pages = known.size // PAGE_SIZE
            if int(offset[mine].max()) >= pages:
                at = int(np.flatnonzero(mine & (offset >= np.uint64(pages)))[0])
                raise error(at, f"is page {int(offset[at]):#x} of slot {slot_id}, which has {pages:#x}; is its size right?")
            gfn[mine] += np.uint64(known.gpa // PAGE_SIZE)
        return gfn

    def epoch(self, epoch: int, pages: Uint64Array) -> None:
        """Take writes of pages of the trace in one epoch; none at all is an idle epoch."""
        self._collector.add(epoch, pages)

    def space(self, npages: int) -> None:
        """Say that the guest has at least this many pages."""
        if self.options.npages is None and self.slots is None:
            self.npages = max(self.npages or 0, npages)

    def note(self, text: str) -> None:
        """Say what the user should know of the conversion, once."""
        if text not in self.notes:
            self.notes.append(text)

    def trace(self) -> Trace:
        """Return the trace of all writes."""
        if self._outside:
            self.note(f"{self._outside} writes lie in no slot (MMIO, or a slot that was not given) and are left out")
        if self.slots:
            self.meta["slots"] = self.slots.describe()
        if self.notes:
            self.meta["notes"] = self.notes
        npages = None if self.squeeze and self.options.npages is None else self.npages
        return self._collector.trace(self.options.interval_ns, npages=npages, squeeze=self.squeeze, meta=self.meta)
