"""The guest on the source: a VM whose vCPUs write what the trace says while time passes, and what dirty logging takes from that time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.cost import CallTime, VmShape, call_time, guest_stall
from spte.guest_tables import GuestTables
from spte.host.backing import Backing
from spte.migrate.plan import Plan
from spte.migrate.playback import TICKS, Int64Array, Playback, Writes
from spte.platform import PAGE_SIZE, SHADOW
from spte.policy import parse
from spte.profile.workload import Gfns
from spte.trace import PAGES_PER_2M
from spte.vm.vm import VM

T = TypeVar("T")
FREE = CallTime(0.0, 0.0, 0.0)
FULL = 100
"""Percent of the time that a vCPU runs when nothing slows it down."""


class GuestError(RuntimeError):
    """A vCPU stopped for a reason that no workload causes."""


@dataclasses.dataclass(slots=True)
class _Clock:
    """A vCPU's own time, and the time that it owes, both in ticks: what it loses, it loses while it is not put to sleep."""

    ticks: int = 0
    debt: int = 0


class Guest:
    """One VM with one memslot: the workload's memory, and behind it L1's tables for L2 if the plan is nested.

    Parameters
    ----------
    plan : Plan
        The guest, its platform and policy, and the costs.

    Attributes
    ----------
    stall_ns : float
        Estimated: time that dirty logging took from all vCPUs so far.
    vmm_ns : float
        Estimated: time of the VMM in ioctls so far.
    reap : callable
        Called when a full ring stopped a vCPU; it frees entries.
    """

    def __init__(self, plan: Plan) -> None:
        work = plan.workload
        self._plan, self._work = plan, work
        ring_bytes = plan.ring_bytes if plan.log == "ring" else 0
        self.vm = VM(plan.platform, parse(plan.policy), vcpus=work.vcpus, manual=plan.manual, ring_bytes=ring_bytes)
        self.npages = plan.npages
        self._backing = Backing(work.backing, self.npages * PAGE_SIZE)
        self.set_logging(0)
        writes = Writes(work)
        self._playbacks = [Playback(writes, v, repeat=plan.after == "repeat") for v in range(work.vcpus)]
        self._clocks = [_Clock() for _ in range(work.vcpus)]
        self.stall_ns = self.vmm_ns = 0.0
        self.reap: Callable[[], object] = lambda: None

    def set_logging(self, flags: int) -> None:
        """Set the flags of the memslot."""
        self.vm.set_memory_region(0, 0, self.npages * PAGE_SIZE, self._backing, flags=flags)

    def populate(self) -> None:
        """Let every vCPU write all its memory, as L1, and if the plan is nested, once more as L2, which it stays then.

        Under shadow paging L1 of a nested plan has its paging on, and L2 has none of its own.
        """
        if not self._plan.nested:
            self.write_all()
            return
        shadow = self.vm.platform.paging == SHADOW
        tables = GuestTables(self._backing, 0, "long" if shadow else self.vm.platform.paging, page=self._work.npages)
        tables.map(0, 0, self._work.npages // PAGES_PER_2M, level=2)
        if shadow:
            for vcpu in self.vm.vcpus:
                vcpu.load_cr3(tables.address())
        self.write_all()
        for vcpu in self.vm.vcpus:
            vcpu.enter_l2(None if shadow else tables.address())
        self.write_all()

    def write_again(self) -> None:
        """Let every vCPU write all its memory once more, as L2 if the plan is nested, and then as L1, which it stays."""
        self.write_all()
        if self._plan.nested:
            for vcpu in self.vm.vcpus:
                vcpu.leave_l2()
            self.write_all()

    def write_all(self) -> None:
        """Let every vCPU write all its memory once."""
        for access in self._work.populate():
            self._write(access.vcpu, access.gfns)

    def counters(self) -> dict[str, int]:
        """Return `VM.counters`."""
        return self.vm.counters()

    def run(self, ns: int, percent: int, limit: int | None) -> list[tuple[Int64Array, Gfns]]:
        """Let `ns` pass while every vCPU sleeps `percent` of the time and may dirty `limit` bytes a second.

        Returns
        -------
        list of (int64 array, uint64 array)
            For each vCPU: after how many ns its writes are done, ascending, and their gfns.
        """
        wrote, seen = [], []
        speed, before = FULL - percent, self.counters()
        idle = dict.fromkeys(before, 0)
        for index, clock in enumerate(self._clocks):
            owed, began = clock.debt, clock.ticks
            clock.debt = max(0, owed - ns * speed)
            clock.ticks += max(0, ns * speed - owed)
            instants, gfns = self._playbacks[index].until(clock.ticks)
            if len(gfns):
                reaped = self._write(index, gfns)
                after = self.counters()
                seen.append({name: value - reaped.get(name, 0) for name, value in changes(before, after).items()})
                before = after
            else:
                seen.append(idle)
            wrote.append(((instants - began + owed) // speed + 1, gfns))
            if limit is not None:
                needed, awake = seen[-1]["dirty_marks"] * PAGE_SIZE * 10**9 // limit, ns - min(ns, owed // speed)
                clock.debt += max(0, needed - awake) * TICKS
        if self._plan.costs is not None and any(len(gfns) for _, gfns in wrote):
            small = min(1.0, self.vm.stats()["vm"]["pages_4k"] / self.npages)
            walks = [round(len(gfns) * small) for _, gfns in wrote]
            stall = guest_stall(seen, self._plan.costs, self._shape(running=True), walks=walks)
            for index, lost in enumerate(stall.vcpus):
                self._delay(index, lost)
        return wrote

    def call(
        self,
        kind: str,
        do: Callable[[], T],
        *,
        words: int = 0,
        entries: Callable[[T], int] = lambda _: 0,
        masks: Callable[[T], int] = lambda _: 0,
        kicks: int = 0,
        running: bool = True,
    ) -> tuple[T, CallTime]:
        """Do a call of the VMM and return what it returns, and its estimated time; running vCPUs lose what the call takes from them.

        Of what it returns, `entries` and `masks` tell how many entries of rings it took, and how many words of 64 pages it armed.
        `kicks`: vCPUs that userspace kicks for it.
        """
        before = self.counters()
        result = do()
        if self._plan.costs is None:
            return result, FREE
        counts = {**changes(before, self.counters()), "masks": masks(result)}
        counts["vcpu_kicks"] += kicks
        time = call_time(kind, counts, self._plan.costs, self._shape(running), words=words, entries=entries(result))
        self.vmm_ns += time.ns
        if running:
            for index in range(len(self._clocks)):
                self._delay(index, time.stall)
        return result, time

    def enable(self) -> CallTime:
        """Turn dirty logging on; returns its estimated time."""
        words = 0 if self._plan.log == "ring" else -(-self.npages // 64)
        return self.call("enable", lambda: self.set_logging(LOG_DIRTY_PAGES), words=words)[1]

    def _shape(self, running: bool) -> VmShape:
        vcpus = len(self._clocks)
        return VmShape(vcpus, vcpus if running else 0, self.vm.platform.tdp_mmu, self._plan.log == "ring")

    def _delay(self, vcpu: int, ns: float) -> None:
        self.stall_ns += ns
        self._clocks[vcpu].debt += round(ns * TICKS)

    def _write(self, index: int, gfns: Gfns) -> dict[str, int]:
        """Write `gfns`; returns what harvests of full rings changed meanwhile."""
        reaped: dict[str, int] = {}
        while (stop := self.vm.vcpus[index].write(gfns)) is not None:
            if stop.reason != "dirty_ring_full":
                raise GuestError(f"vCPU {index} stopped at gfn {stop.gfn}: {stop.reason}")
            before, spent = self.counters(), self.vmm_ns
            self.reap()
            self._delay(index, self.vmm_ns - spent)  # the vCPU's own thread harvests
            reaped = {name: reaped.get(name, 0) + value for name, value in changes(before, self.counters()).items()}
            gfns = gfns[stop.index :]
        return reaped


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """Return by how much each count grew."""
    return {name: value - before[name] for name, value in after.items()}
