"""Estimates: exact counts times costs, and what mmu_lock adds.

Counts bear the names of `VM.counters`. The guest's side is `guest_stall`: how long each vCPU does not run its program because of
dirty logging. The other side is `call_time`: how long an ioctl of the VMM takes, and how long it keeps slow faults out.

What is not in it: caches that are cold after an exit, hyperthreads that share a core, and more vCPUs than CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from spte.cost.costs import CostError, Costs

ENTRIES = 512
"""Entries of a page table: a split writes them and the link to them."""
RESET_MASK = 64
"""RESET_DIRTY_RINGS takes mmu_lock for at most so many pages at a time, one mask."""
CALLS = ("enable", "get", "clear", "collect", "reset", "disable")

Counts = Mapping[str, int]
"""Counts by the names of `VM.counters`; those that are missing are 0."""


class VmShape(NamedTuple):
    """What of a VM decides how its counts add up.

    Parameters
    ----------
    vcpus : int
        vCPUs of the VM.
    running : int
        Those that run in the guest while the VMM makes its calls: each of them is interrupted by a flush.
    shared : bool
        Slow faults hold mmu_lock shared (TDP MMU, `Platform.tdp_mmu`); else exclusively, one at a time.
    ring : bool
        Pages are marked by entries of a dirty ring.
    """

    vcpus: int
    running: int
    shared: bool
    ring: bool = False


class Stall(NamedTuple):
    """Time that vCPUs lose, ns.

    Parameters
    ----------
    vcpus : tuple of float
        Of each vCPU, waiting for mmu_lock included.
    hold : float
        Longest exclusive hold of mmu_lock by a fault.
    """

    vcpus: tuple[float, ...]
    hold: float

    @property
    def total(self) -> float:
        """CPU time lost, ns: the sum over the vCPUs."""
        return sum(self.vcpus)

    @property
    def longest(self) -> float:
        """Time lost by the vCPU that loses most, ns."""
        return max(self.vcpus, default=0.0)


class CallTime(NamedTuple):
    """Time of a call of the VMM, ns.

    Parameters
    ----------
    ns : float
        The call itself.
    hold : float
        Longest exclusive hold of mmu_lock in it.
    stall : float
        What each running vCPU loses by being interrupted.
    """

    ns: float
    hold: float
    stall: float


def guest_stall(vcpus: Sequence[Counts], costs: Costs, shape: VmShape, *, walks: Sequence[int] | None = None) -> Stall:
    """Return what the vCPUs lose in a phase in which they run side by side.

    Parameters
    ----------
    vcpus : sequence of mapping of str to int
        Counts of each vCPU that ran, taken while it ran: `faults_fast`, `faults_slow`, `splits_2m`, `splits_1g`, `zapped`, `flushes`,
        `pml_entries`, `pml_full`, `dirty_marks`, `ring_full`.
    costs : Costs
        ns per item.
    shape : VmShape
        The VM.
    walks : sequence of int, optional
        Of each vCPU, accesses that take a second-level walk to a 4 KiB page; by default none.

    Returns
    -------
    Stall
        Each vCPU's loss. Under an exclusive mmu_lock a vCPU is as slow as the lock when that serves the vCPUs in turn; under a shared
        one, each other vCPU that faults meanwhile adds `costs.shared_contention`.
    """
    walks = [0] * len(vcpus) if walks is None else walks
    if len(walks) != len(vcpus):
        raise CostError(f"walks has {len(walks)} entries for {len(vcpus)} vCPUs; give one of each")
    slow = np.array([each.get("faults_slow", 0) for each in vcpus], np.float64)
    under_lock = np.array([_under_lock(each, costs, shape, running=len(vcpus)) for each in vcpus], np.float64)
    own = under_lock + np.array([_without_lock(each, costs, shape, w) for each, w in zip(vcpus, walks, strict=True)], np.float64)
    flushes = np.array([each.get("flushes", 0) for each in vcpus], np.float64)
    own += (flushes.sum() - flushes) * costs.exit  # each vCPU is interrupted by the flushes of the others
    meetings = np.minimum.outer(slow, slow)  # faults of vCPU j that fall into the time in which vCPU i faults
    if shape.shared:
        return Stall(tuple((own + costs.shared_contention * (meetings.sum(1) - slow)).tolist()), 0.0)
    each_fault = np.divide(under_lock, slow, out=np.zeros_like(slow), where=slow > 0)
    served = meetings @ each_fault
    return Stall(tuple(np.maximum(own, served).tolist()), float(each_fault.max(initial=0.0)))


def _without_lock(counts: Counts, costs: Costs, shape: VmShape, walks: int) -> float:
    exits = sum(counts.get(name, 0) for name in ("faults_fast", "faults_slow", "pml_full", "ring_full"))
    return (
        exits * costs.exit
        + counts.get("faults_fast", 0) * costs.fast_fault
        + counts.get("pml_entries", 0) * costs.pml_log
        + counts.get("pml_full", 0) * costs.pml_full_exit
        + counts.get("ring_full", 0) * costs.ring_full_exit
        + (counts.get("dirty_marks", 0) * costs.ring_push if shape.ring else 0.0)
        + walks * costs.walk_2d
    )


def _under_lock(counts: Counts, costs: Costs, shape: VmShape, running: int) -> float:
    """Return the time of all slow faults of a vCPU under mmu_lock: the faults, and what they split, drop and flush."""
    fault = costs.slow_fault_shared if shape.shared else costs.slow_fault_exclusive
    return (
        counts.get("faults_slow", 0) * fault
        + _splits(counts) * costs.split
        + counts.get("zapped", 0) * costs.zap
        + counts.get("flushes", 0) * _flush(costs, shape.vcpus, max(0, running - 1))
    )


def call_time(kind: str, counts: Counts, costs: Costs, shape: VmShape, *, words: int = 0, entries: int = 0) -> CallTime:
    """Return what one call of the VMM takes.

    Parameters
    ----------
    kind : str
        One of `CALLS`: ``"enable"`` and ``"disable"`` of a slot's logging, ``"get"``, ``"clear"``, ``"reset"``; ``"collect"`` is
        userspace reading the rings.
    counts : mapping of str to int
        Counts of the call: `sptes_written`, `splits_2m`, `splits_1g`, `zapped`, `collapsed`, `flushes`, `vcpu_kicks`; `masks`, the
        words of 64 pages of which it arms any; and `dropped`, the leaves that went with their tables, if `zapped` does not hold them.
    costs : Costs
        ns per item.
    shape : VmShape
        The VM.
    words : int
        Words of the dirty bitmap (64 pages each) that the call allocates, reads or writes.
    entries : int
        Ring entries that ``"collect"`` takes.

    Returns
    -------
    CallTime
        A kick is an exit; before ``"collect"`` it takes the vCPU to userspace, which drains PML into its ring. GET that clears, and
        CLEAR, hold mmu_lock exclusively until they flush, RESET for a mask of 64 pages at a time. Walks of a whole
        slot let others in when they wait, so enabling and disabling have no hold here.

    Raises
    ------
    CostError
        If there is no such call.
    """
    if kind not in CALLS:
        raise CostError(f"kind={kind!r} is no call; take one of {', '.join(CALLS)}")
    zapped, collapsed = counts.get("zapped", 0), counts.get("collapsed", 0)
    leaf_by_leaf = zapped == collapsed  # as kernels before 5.19 collapse; else tables were dropped, or recovered in place
    leaves = max(zapped, counts.get("dropped", 0))  # a table that goes takes its leaves along, each by an atomic operation
    tables = 0.0 if leaf_by_leaf else max(collapsed, leaves / ENTRIES)
    armed = max(0, counts.get("sptes_written", 0) - (ENTRIES + 1) * _splits(counts) - collapsed)
    walked = (
        words * (costs.bitmap_word if kind == "enable" else costs.get_word)
        + _splits(counts) * costs.split
        + counts.get("masks", 0) * costs.mask_walk
        + armed * costs.clear_page
        + tables * costs.collapse_2m
        + leaves * costs.zap
    )
    hold = 0.0
    if kind == "clear" or (kind == "get" and armed):
        hold = walked
    elif kind == "reset":
        hold = min(armed, RESET_MASK) * costs.clear_page + min(armed, 1) * costs.mask_walk
    flushes = counts.get("flushes", 0)
    kicks = counts.get("vcpu_kicks", 0) / shape.vcpus
    ns = walked + flushes * _flush(costs, shape.vcpus, shape.running) + kicks * shape.running * costs.flush_vcpu
    kick = costs.exit + (costs.ring_full_exit if kind == "collect" else 0.0)
    return CallTime(ns + entries * costs.ring_collect, hold, flushes * costs.exit + kicks * kick)


def _splits(counts: Counts) -> int:
    return counts.get("splits_2m", 0) + counts.get("splits_1g", 0)


def _flush(costs: Costs, vcpus: int, running: int) -> float:
    return vcpus * costs.flush_request + running * costs.flush_vcpu
