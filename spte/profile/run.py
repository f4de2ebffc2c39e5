"""What dirty logging costs: a workload through one VM for each platform and policy, phase by phase.

The phases are those of the kernel selftest dirty_log_perf_test: populate, enable logging, then per iteration the
guest's accesses and a harvest, at last disable logging. A harvest is

* bitmap, manual protect off: GET_DIRTY_LOG of every slot (it re-arms the pages it reports);
* bitmap, manual protect on: GET_DIRTY_LOG of every slot, then CLEAR_DIRTY_LOG of the whole slot with what GET gave; with
  initially-set the first one reports every page;
* dirty ring: collect all dirty entries, then RESET_DIRTY_RINGS; also whenever a full ring stops a vCPU.

Counts are exact and depend on nothing but the arguments. Seconds are how long this library took on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.access import WRITE
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.host.backing import Backing
from spte.limits.bare_loops import scatter_bits
from spte.platform import PAGE_SIZE
from spte.policy import Policy, parse
from spte.profile.report import Epoch, Phase, Row
from spte.profile.workload import Access, Workload
from spte.vm.vm import VM
from spte.warm import warmup

DIRECT = ("ept-pml", "ept-nopml", "ept-noad", "npt", "npt-pml")
"""The platforms with two-dimensional paging."""
RING_DIRTY = 1
RING_HARVESTED = 3
"""Flags of a dirty-ring entry that userspace collected: dirty | reset."""

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what): steps done, steps in all, the platform and policy at work."""


class ProfileError(RuntimeError):
    """A vCPU stopped for a reason that no workload causes."""


def profile(
    workload: Workload,
    platforms: Sequence[str] = DIRECT,
    policies: Sequence[str | Policy] = ("6.12",),
    *,
    progress: Progress | None = None,
) -> list[Row]:
    """Run `workload` on a fresh VM for every platform under every policy.

    Parameters
    ----------
    workload : Workload
        `spte.profile.workload.TraceWorkload`, `spte.profile.perf_test.PerfTest`, or anything of that shape.
    platforms : sequence of str
        Platform names.
    policies : sequence of str or Policy
        Policies as `spte.policy.parse` reads them, or values.
    progress : callable, optional
        Called as ``progress(done, total, what)`` after each step.

    Returns
    -------
    list of Row
        Policy by policy, platforms in the order given.

    Raises
    ------
    KvmError
        If a platform, policy or ring size is refused; raised before the first run.
    """
    chosen = [parse(p) if isinstance(p, str) else p for p in policies]
    pairs = [(platform, policy) for policy in chosen for platform in platforms]
    for platform, policy in pairs:
        _Run(workload, platform, policy).vm.close()
    steps = ["guest access", "logging"] + ["rings"] * bool(workload.ring_bytes)
    warmup(steps=steps + ["old policies"] * any(policy.collapse == "zap-leaf" for policy in chosen))
    per_run = workload.nepochs + 2
    rows = []
    for i, (platform, policy) in enumerate(pairs):

        def step(done: int, first: int = i * per_run, what: str = f"{platform} {policy.name}") -> None:
            if progress is not None:
                progress(first + done, len(pairs) * per_run, what)

        with (run := _Run(workload, platform, policy)).vm:
            rows.append(run.row(step))
    return rows


class _Run:
    """One VM, its slots, and the phases so far."""

    def __init__(self, workload: Workload, platform: str, policy: Policy) -> None:
        self.workload, self.platform, self.policy = workload, platform, policy
        self.vm = VM(platform, policy, vcpus=workload.vcpus, manual=workload.manual, ring_bytes=workload.ring_bytes)
        self.per_slot = workload.npages // workload.slots
        self.backings = [Backing(workload.backing, self.per_slot * PAGE_SIZE) for _ in range(workload.slots)]
        for slot in range(workload.slots):
            self._set_slot(slot, 0)
        self.harvest = ("collect", "reset") if workload.ring_bytes else ("get", "clear") if workload.manual else ("get",)
        self.fetched = [0] * workload.vcpus
        self.phases: list[Phase] = []
        self.accesses = 0
        words = -(-self.per_slot // 64)
        self.written = np.zeros((workload.slots, words), np.uint64)
        self.collected = np.zeros((workload.slots if workload.ring_bytes else 0, words), np.uint64)

    def row(self, step: Callable[[int], None]) -> Row:
        work, leafs, epochs = self.workload, {}, []
        step(0)
        populate = self._phase("populate")
        for access in work.populate():
            self._guest(access, populate, None)
        leafs["populate"] = self._leafs()
        step(1)
        self._toggle("enable", LOG_DIRTY_PAGES)
        for index in range(work.nepochs):
            epochs.append(self._epoch(index))
            step(index + 2)
        leafs["logging"] = self._leafs()
        self._toggle("disable", 0)
        leafs["disable"] = self._leafs()
        return Row(self.platform, self.policy.name, tuple(self.phases), tuple(epochs), self.accesses, leafs, work.t_ns)

    def _toggle(self, kind: str, flags: int) -> None:
        phase = self._phase(kind)
        for slot in range(self.workload.slots):
            with self._account(phase):
                self._set_slot(slot, flags)
            if kind == "disable":
                for access in self.workload.during_disable():
                    self._guest(access, phase, None)

    def _epoch(self, index: int) -> Epoch:
        dirty, *harvest = (self._phase(kind, index + 1) for kind in ("dirty", *self.harvest))
        self.written.fill(0)
        self.collected.fill(0)
        for access in self.workload.epoch(index):
            self.accesses += len(access.gfns)
            self._mark_written(access.gfns if access.kinds is None else access.gfns[access.kinds == WRITE])
            self._guest(access, dirty, harvest)
        if self.workload.ring_bytes:
            self._harvest_rings(*harvest)
            logs = list(self.collected)
        else:
            logs = [self._harvest_slot(slot, *harvest) for slot in range(self.workload.slots)]
        began_set = index == 0 and self.workload.manual == 3 and not self.workload.ring_bytes
        return _compare(self.written, logs, self.per_slot, "initially_set" if began_set else "over_reported")

    def _mark_written(self, gfns: npt.NDArray[np.uint64]) -> None:
        bits = gfns.view(np.int64)
        if self.workload.slots > 1:
            slot, offset = np.divmod(bits, self.per_slot)
            bits = slot * (64 * self.written.shape[1]) + offset
        scatter_bits(self.written.reshape(-1), np.ascontiguousarray(bits))

    def _harvest_slot(self, slot: int, get: Phase, clear: Phase | None = None) -> npt.NDArray[np.uint64]:
        with self._account(get):
            log = self.vm.get_dirty_log(slot)
        if clear is not None:
            with self._account(clear):
                self.vm.clear_dirty_log(slot, 0, self.per_slot, log)
        return log

    def _harvest_rings(self, collect: Phase, reset: Phase) -> None:
        with self._account(collect):
            for index, vcpu in enumerate(self.vm.vcpus):
                self._collect(index, vcpu.ring)
        with self._account(reset):
            self.vm.reset_dirty_rings()

    def _collect(self, index: int, ring: npt.NDArray[np.void]) -> None:
        """Take the dirty entries of one ring, oldest first, up to the first that is not dirty."""
        order = (self.fetched[index] + np.arange(len(ring))) % len(ring)
        dirty = ring["flags"][order] == RING_DIRTY
        entries = order[: len(ring) if dirty.all() else int(dirty.argmin())]
        bits = ring["slot"][entries].astype(np.int64) * (64 * self.collected.shape[1]) + ring["offset"][entries].astype(np.int64)
        scatter_bits(self.collected.reshape(-1), bits)
        ring["flags"][entries] = RING_HARVESTED
        self.fetched[index] = (self.fetched[index] + len(entries)) % len(ring)

    def _guest(self, access: Access, phase: Phase, harvest: Sequence[Phase] | None) -> None:
        vcpu, gfns, kinds = self.vm.vcpus[access.vcpu], access.gfns, access.kinds
        while True:
            with self._account(phase):
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
        phase = Phase(kind, iteration, dict.fromkeys(self._counts(), 0))
        self.phases.append(phase)
        return phase

    def _counts(self) -> dict[str, int]:
        flushes = self.vm.stats()["vm"]["remote_tlb_flush_requests"]
        return {**self.vm.counters(), "flushes": flushes}

    def _leafs(self) -> dict[str, int]:
        stats = self.vm.stats()["vm"]
        return {name: stats[name] for name in ("pages_4k", "pages_2m", "pages_1g")}

    @contextmanager
    def _account(self, phase: Phase) -> Iterator[None]:
        before = self._counts()
        start = time.perf_counter()
        yield
        phase.seconds += time.perf_counter() - start
        for name, value in self._counts().items():
            phase.counts[name] += value - before[name]


def _compare(written: npt.NDArray[np.uint64], logs: Sequence[npt.NDArray[np.uint64]], per_slot: int, others: str) -> Epoch:
    """Compare the bitmap of the pages written, a row a slot, with each slot's log; `others`: what pages are that were not written."""
    total: dict[str, Any] = {"written": 0, "reported": 0, "initially_set": 0, "over_reported": 0, "lost": 0}
    first_lost = None
    for slot, log in enumerate(logs):
        expected = written[slot]
        missing = expected & ~log
        for name, words in (
            ("written", expected),
            ("reported", log),
            (others, log & ~expected),
            ("lost", missing),
        ):
            total[name] += int(np.bitwise_count(words).sum(dtype=np.int64))
        if first_lost is None and (at := np.flatnonzero(missing)).size:
            word = int(missing[at[0]])
            first_lost = slot * per_slot + int(at[0]) * 64 + (word & -word).bit_length() - 1
    return Epoch(**total, first_lost=first_lost)
