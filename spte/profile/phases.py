"""One VM through all phases of a profile, each counted and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.access import WRITE
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.host.backing import Backing
from spte.limits.bare_loops import scatter_bits
from spte.platform import PAGE_SIZE
from spte.profile.columns import Column
from spte.profile.report import HARVEST, Epoch, Phase, Row, compare
from spte.profile.rings import RingReader, masks
from spte.profile.workload import Access, Workload
from spte.vm.vm import VM

Observe = Callable[[VM, Phase], None]


class ProfileError(RuntimeError):
    """A vCPU stopped for a reason that no workload causes."""


class Plan(NamedTuple):
    """What all columns do alike.

    Parameters
    ----------
    clear_chunk : int or None
        Pages that one CLEAR takes; None: a whole slot.
    from_creation : bool
        Logging begins with the slots, not once all is populated.
    retouch : bool
        When logging has ended, the guest writes every page once more.
    """

    clear_chunk: int | None = None
    from_creation: bool = False
    retouch: bool = False


class Run:
    """One VM, its slots, and the phases so far.

    Parameters
    ----------
    workload : Workload
        What the guest does.
    column : Column
        On what, and how it is logged.
    plan : Plan
        Which phases there are.
    observe : callable, optional
        Called as ``observe(vm, phase)`` after each batch of a vCPU and each call of the VMM.
    """

    def __init__(self, workload: Workload, column: Column, plan: Plan, observe: Observe | None = None) -> None:
        self.observe = observe
        self.workload, self.column, self.plan = workload, column, plan
        self.log = column.log
        self.vm = VM(column.platform, column.policy, vcpus=workload.vcpus, manual=self.log.manual, ring_bytes=self.log.ring_bytes)
        self.per_slot = workload.npages // workload.slots
        self.backings = [Backing(column.backing, self.per_slot * PAGE_SIZE) for _ in range(workload.slots)]
        if not plan.from_creation:
            for slot in range(workload.slots):
                self._set_slot(slot, 0)
        self.readers = [RingReader() for _ in range(workload.vcpus)]
        self.phases: list[Phase] = []
        self.accesses = 0
        words = -(-self.per_slot // 64)
        self.written = np.zeros((workload.slots, words), np.uint64)
        self.collected = np.zeros((workload.slots if self.log.ring_bytes else 0, words), np.uint64)

    def row(self, step: Callable[[int], None]) -> Row:
        """Go through all phases; `step` is called with the number of each that is done."""
        work, leafs, epochs = self.workload, {}, []
        step(0)
        populated = self._populate()
        leafs["populate"] = self._leafs()
        step(1)
        if not self.plan.from_creation:
            self._toggle("enable", LOG_DIRTY_PAGES)
        for index in range(work.nepochs):
            epochs.append(self._epoch(index))
            step(index + 2)
        leafs["logging"] = self._leafs()
        self._toggle("disable", 0)
        leafs["disable"] = self._leafs()
        if self.plan.retouch:
            retouch = self._phase("retouch")
            for access in work.populate():
                self._guest(access, retouch, None)
            self._ended(retouch)
        phases = tuple(self.phases)
        return Row(self.column, work.vcpus, work.npages, phases, tuple(epochs), self.accesses, leafs, work.t_ns, populated)

    def _populate(self) -> Epoch | None:
        """Let the guest write all its memory; harvest if logging begins with the slots."""
        if self.plan.from_creation:
            self._toggle("enable", LOG_DIRTY_PAGES)
            return self._round("populate", 0, self.workload.populate())
        populate = self._phase("populate")
        for access in self.workload.populate():
            self._guest(access, populate, None)
        self._ended(populate)
        return None

    def _toggle(self, kind: str, flags: int) -> None:
        phase = self._phase(kind)
        for slot in range(self.workload.slots):
            with self._account(phase):
                self._set_slot(slot, flags)
            if kind == "disable":
                for access in self.workload.during_disable():
                    self._guest(access, phase, (phase, phase))  # rings of slots that still log may fill
        self._ended(phase)

    def _epoch(self, index: int) -> Epoch:
        accesses = 0

        def counted() -> Iterator[Access]:
            nonlocal accesses
            for access in self.workload.epoch(index):
                accesses += len(access.gfns)
                yield access

        epoch = self._round("dirty", index + 1, counted())
        self.accesses += accesses
        return epoch

    def _round(self, kind: str, iteration: int, accesses: Iterable[Access]) -> Epoch:
        """Let the guest access its memory, harvest, and compare."""
        guest, *harvest = (self._phase(each, iteration) for each in (kind, *self.log.harvest))
        first_harvest = all(phase in harvest for phase in self.phases if phase.kind in HARVEST)
        self.written.fill(0)
        self.collected.fill(0)
        for access in accesses:
            self._mark_written(access.gfns if access.kinds is None else access.gfns[access.kinds == WRITE])
            self._guest(access, guest, harvest)
        self._ended(guest)
        if self.log.ring_bytes:
            self._harvest_rings(*harvest)
            logs = list(self.collected)
        else:
            logs = [self._harvest_slot(slot, *harvest) for slot in range(self.workload.slots)]
        for phase in harvest:
            self._ended(phase)
        began_set = first_harvest and self.log.reports_all_once
        return compare(self.written, logs, self.per_slot, "initially_set" if began_set else "over_reported")

    def _mark_written(self, gfns: npt.NDArray[np.uint64]) -> None:
        bits = gfns.view(np.int64)
        if self.workload.slots > 1:
            slot, offset = np.divmod(bits, self.per_slot)
            bits = slot * (64 * self.written.shape[1]) + offset
        scatter_bits(self.written.reshape(-1), np.ascontiguousarray(bits))

    def _harvest_slot(self, slot: int, get: Phase, clear: Phase | None = None) -> npt.NDArray[np.uint64]:
        with self._account(get) as call:
            log = self.vm.get_dirty_log(slot)
        if clear is None:
            _add_masks(get, call, int(np.count_nonzero(log)))
        else:
            chunk = self.plan.clear_chunk or self.per_slot
            for first in range(0, self.per_slot, chunk):
                pages = min(chunk, self.per_slot - first)
                words = log[first // 64 : -(-(first + pages) // 64)]
                with self._account(clear) as call:
                    self.vm.clear_dirty_log(slot, first, pages, words)
                _add_masks(clear, call, int(np.count_nonzero(words)))
        return log

    def _harvest_rings(self, collect: Phase, reset: Phase) -> None:
        with self._account(collect):
            taken = sum(self._collect(index, vcpu.ring) for index, vcpu in enumerate(self.vm.vcpus))
        with self._account(reset) as call:
            self.vm.reset_dirty_rings()
        _add_masks(reset, call, taken)

    def _collect(self, index: int, ring: npt.NDArray[np.void]) -> int:
        """Take the dirty entries of one ring; return in how many masks they will be reset."""
        entries = self.readers[index].take(ring)
        bits = entries["slot"].astype(np.int64) * (64 * self.collected.shape[1]) + entries["offset"].astype(np.int64)
        scatter_bits(self.collected.reshape(-1), bits)
        return masks(bits)

    def _guest(self, access: Access, phase: Phase, harvest: Sequence[Phase] | None) -> None:
        vcpu, gfns, kinds = self.vm.vcpus[access.vcpu], access.gfns, access.kinds
        own = phase.vcpus.setdefault(access.vcpu, dict.fromkeys((*phase.counts, "accesses"), 0))
        own["accesses"] += len(gfns)
        while True:
            with self._account(phase, own):
                stop = vcpu.write(gfns) if kinds is None else vcpu.run(gfns, kinds)
            if stop is None:
                return
            if stop.reason != "dirty_ring_full" or harvest is None:
                raise ProfileError(f"vCPU {access.vcpu} stopped at gfn {stop.gfn}: {stop.reason}")
            self._harvest_rings(*harvest)
            gfns = gfns[stop.index :]
            kinds = None if kinds is None else kinds[stop.index :]

    def _set_slot(self, slot: int, flags: int) -> None:
        size = self.per_slot * PAGE_SIZE
        self.vm.set_memory_region(slot, slot * size, size, self.backings[slot], flags=flags)

    def _phase(self, kind: str, iteration: int = 0) -> Phase:
        phase = Phase(kind, iteration, dict.fromkeys((*self.vm.counters(), "masks"), 0))
        self.phases.append(phase)
        return phase

    def _ended(self, phase: Phase) -> None:
        phase.pages_4k = self._leafs()["pages_4k"]

    def _leafs(self) -> dict[str, int]:
        stats = self.vm.stats()["vm"]
        return {name: stats[name] for name in ("pages_4k", "pages_2m", "pages_1g")}

    @contextmanager
    def _account(self, phase: Phase, vcpu: dict[str, int] | None = None) -> Iterator[dict[str, int]]:
        """Count and time what is done in between for `phase`, and for a vCPU that runs; else it is a call of the VMM, and yielded."""
        changes: dict[str, int] = {}
        before = self.vm.counters()
        start = time.perf_counter()
        yield changes
        phase.seconds += time.perf_counter() - start
        changes |= {name: value - before[name] for name, value in self.vm.counters().items()}
        if vcpu is None:
            phase.calls += 1
            if changes["sptes_written"] >= phase.largest.get("sptes_written", 0):
                phase.largest = changes
        for counts in (phase.counts, vcpu):
            if counts is not None:
                for name, change in changes.items():
                    counts[name] += change
        if self.observe is not None:
            self.observe(self.vm, phase)


def _add_masks(phase: Phase, call: dict[str, int], masks: int) -> None:
    call["masks"] = masks
    phase.counts["masks"] += masks
