"""What is to be seen of a VM: statistics, listings of its tables and slots, the invariants, events."""

from __future__ import annotations

from typing import Any

from spte._arguments import flag, integer, spell
from spte.errors import ArgumentError
from spte.host.lock import exclusive
from spte.observe import invariants, listing, stats
from spte.vm.kvm import Kvm


def _gfns(hide: Any) -> tuple[int, int] | None:
    """Return the gfns that a listing leaves out, None or ``(first, end)``, as ints; else TypeError or ArgumentError."""
    if hide is None:
        return None
    if not isinstance(hide, tuple | list) or len(hide) != 2:
        raise TypeError(f"hide={spell(hide)} is of type {type(hide).__name__}; pass (first gfn, end gfn)")
    return integer(hide[0], "hide[0]"), integer(hide[1], "hide[1]")


class Observed:
    """A VM as it can be looked at.

    Parameters
    ----------
    kvm : Kvm
        Its state.
    """

    def __init__(self, kvm: Kvm) -> None:
        self.kvm, self.exclusive = kvm, kvm.exclusive

    @exclusive
    def stats(self) -> dict[str, Any]:
        """Return KVM's statistics in the kernel's names, those of vCPUs added up; by file under ``"vm"``, ``"vcpu0"``, ..."""
        return stats.stats(self.kvm.mmu.tables, self.kvm.vcpu_arrays)

    @exclusive
    def counters(self) -> dict[str, int]:
        """Return the model's own counts since the VM was made: SPTEs written, splits, zaps, PML entries, exits, faults."""
        return stats.counters(self.kvm.mmu.tables, self.kvm.vcpu_arrays)

    @exclusive
    def leafs(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return leaves of the root of `vcpu` as ``[level, first_gfn, count, flags]`` runs; `hide` leaves gfns ``[a, b)`` out."""
        return listing.leafs(self._walk(vcpu, hide), self.kvm.bits)

    @exclusive
    def tables(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return page-table pages as ``[level, gfn, count, role, tdp, nx_disallowed, unsync]`` runs; `vcpu`, `hide` as `leafs`."""
        runs = self._walk(vcpu, hide)
        return listing.tables(self.kvm.mmu.tables, runs, self.kvm.role_of(vcpu, self._root(vcpu)))

    @exclusive
    def other(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return MMIO and frozen entries as ``[level, gfn, hex]``; `vcpu`, `hide` as `leafs`."""
        return listing.other(self._walk(vcpu, hide), self.kvm.bits)

    def _walk(self, vcpu: int, hide: tuple[int, int] | None) -> list[listing.Run]:
        return listing.walk(self.kvm.mmu.tables, self._root(self._index(vcpu)), _gfns(hide))

    def _index(self, vcpu: int) -> int:
        if not self.kvm.vcpus:
            raise ArgumentError(f"vcpu={spell(vcpu)}: the VM has none; call create_vcpu() first")
        return integer(vcpu, "vcpu", least=0, end=len(self.kvm.vcpus))

    def _root(self, vcpu: int) -> int:
        return int(self.kvm.vcpus[vcpu].arrays.vcpu[0].root)

    @exclusive
    def roots(self, *, hide: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """Return every root that a vCPU keeps, in the shape of the nested recordings: where it is kept, its role, what it maps.

        Leaves of `guest_mmu` have L1's gfn as a fifth value. `hide` leaves gfns ``[a, b)`` out.
        """
        return listing.roots(self.kvm.mmu.tables, self.kvm.bits, self.kvm.kept_roots(), _gfns(hide))

    @exclusive
    def slots(self) -> list[dict[str, Any]]:
        """Return every memslot: numbers, lpage_info counters and dirty bitmap as runs."""
        return self.kvm.memslots.records()

    @exclusive
    def check(self) -> None:
        """Scan the invariants of tables, counters and logging state; InvariantError names the first that does not hold."""
        spaces, logging = self.kvm.memslots.spaces, self.kvm.nr_memslots_dirty_logging
        invariants.check(self.kvm.mmu.tables, spaces, self.kvm.mmu.mode, self.kvm.vcpu_arrays, logging)

    @exclusive
    def trace_events(self, on: bool) -> None:
        """Record tracepoints from now on, or stop to."""
        self.kvm.trace(events=flag(on, "on"))

    @exclusive
    def trace_hw(self, on: bool) -> None:
        """Record what the hardware logs (PML entries, full buffers) from now on, or stop to."""
        self.kvm.trace(hardware=flag(on, "on"))

    @exclusive
    def drain_events(self) -> list[list[Any]]:
        """Return the recorded tracepoints, ``[name, fields...]`` in order, and forget them."""
        return self.kvm.mmu.log.drain_events()

    @exclusive
    def drain_hw(self) -> list[list[Any]]:
        """Return the recorded PML entries and full buffers in order, and forget them."""
        return self.kvm.mmu.log.drain_hw()
