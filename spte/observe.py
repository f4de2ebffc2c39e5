"""What can be seen of a VM from outside: statistics, tables, memslots, invariants, tracepoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spte.invariants import check as check_invariants
from spte.memslot import Memslots
from spte.stats import counters, stats
from spte.tdp_mmu import TdpMmu

if TYPE_CHECKING:
    from spte.vcpu import VirtualCpu


class Observable:
    """The part of a VM that only looks."""

    mmu: TdpMmu
    memslots: Memslots
    vcpus: Sequence[VirtualCpu]
    nr_memslots_dirty_logging: int

    def stats(self) -> dict[str, Any]:
        """Return KVM's statistics in the kernel's names, those of vCPUs added up; by file under ``"vm"``, ``"vcpu0"``, ..."""
        return stats(self)

    def counters(self) -> dict[str, int]:
        """Return the model's own counts since the VM was made: SPTEs written, splits, zaps, PML entries, exits, faults."""
        return counters(self)

    def leafs(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return the leaves of a vCPU's root as ``[level, first_gfn, count, flags]`` runs; `hide` leaves gfns ``[a, b)`` out."""
        return self.mmu.leafs(vcpu, hide)

    def tables(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return its page-table pages as ``[level, gfn, count, role, tdp, nx_disallowed, unsync]`` runs."""
        return self.mmu.table_runs(vcpu, hide)

    def other(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return its MMIO and frozen entries as ``[level, gfn, hex]``."""
        return self.mmu.other(vcpu, hide)

    def slots(self) -> list[dict[str, Any]]:
        """Return every memslot: numbers, lpage_info counters and dirty bitmap as runs."""
        return self.memslots.records()

    def check(self) -> None:
        """Scan the invariants of tables, counters and logging state; InvariantError names the first that does not hold."""
        check_invariants(self)

    def trace_events(self, on: bool) -> None:
        """Record tracepoints from now on, or stop to."""
        self.mmu.log.tracing = on
        self._keep_logs()

    def trace_hw(self, on: bool) -> None:
        """Record what the hardware logs (PML entries, full buffers) from now on, or stop to."""
        self.mmu.log.hardware = on
        self._keep_logs()

    def _keep_logs(self) -> None:
        for vcpu in self.vcpus:
            vcpu.keep_log(self.mmu.log.on)

    def drain_events(self) -> list[list[Any]]:
        """Return the recorded tracepoints, ``[name, fields...]`` in order, and forget them."""
        return self.mmu.log.drain_events()

    def drain_hw(self) -> list[list[Any]]:
        """Return the recorded PML entries and full buffers in order, and forget them."""
        return self.mmu.log.drain_hw()
