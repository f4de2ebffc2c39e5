"""What can be seen of a VM from outside: statistics, tables, memslots, invariants, tracepoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spte.arrays.tables import PAE_ROOT
from spte.bits import ROLE_GUEST_MODE, ROLE_INVALID, ROLE_IS_DIRECT
from spte.kernel_bits import KernelBits, kernel_bits
from spte.observe import listing
from spte.observe.invariants import check as check_invariants
from spte.observe.stats import counters, stats
from spte.platform import Platform
from spte.policy import Policy
from spte.vm.memslots import Memslots
from spte.vm.mmu import Mmu

if TYPE_CHECKING:
    from spte.vm.vcpu import VirtualCpu


class Observable:
    """The part of a VM that only looks."""

    platform: Platform
    policy: Policy
    mmu: Mmu
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
        return listing.leafs(self._walk(vcpu, hide), self.bits)

    def tables(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return its page-table pages as ``[level, gfn, count, role, tdp, nx_disallowed, unsync]`` runs."""
        return listing.tables(self.mmu.tables, self._walk(vcpu, hide), self.role_of(vcpu))

    def other(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return its MMIO and frozen entries as ``[level, gfn, hex]``."""
        return listing.other(self._walk(vcpu, hide), self.bits)

    @property
    def bits(self) -> KernelBits:
        """How the kernel of the VM's policy has its SPTEs and roles; the arena itself has one layout."""
        return kernel_bits(self.platform, self.policy)

    def role_of(self, vcpu: int) -> Callable[[int], int]:
        """Return a function that gives the role of a row below a root of `vcpu` as the kernel has it."""
        t, bits, nx = self.mmu.tables, self.bits, self.vcpus[vcpu].long_mode

        def role(row: int) -> int:
            below = not t.pages[row].shadow and t.parent[row] >= 0
            return bits.role(int(t.pages[row].role), tdp=below, pae=int(t.pages[row].shadow) == PAE_ROOT, nx=nx)

        return role

    def _walk(self, vcpu: int, hide: tuple[int, int] | None) -> list[listing.Run]:
        return listing.walk(self.mmu.tables, int(self.vcpus[vcpu].arrays.vcpu[0].root), hide)

    def roots(self, *, hide: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """Return every root that a vCPU keeps, in the shape of the nested recordings: where it is kept, its role, what it maps.

        Leaves of `guest_mmu` have L1's gfn as a fifth value. `hide` leaves gfns ``[a, b)`` out.
        """
        t, found = self.mmu.tables, []
        seen: dict[int, str] = {}
        for vcpu in self.vcpus:
            for name, cache in (("root_mmu", vcpu.root_mmu), ("guest_mmu", vcpu.guest_mmu)):
                for which, root in cache:
                    role, named = int(t.pages[root.row].role), self.role_of(vcpu.index)
                    entry = {"vcpu": vcpu.index, "mmu": name, "which": which, "active": int(cache is vcpu.active and which == "cur")}
                    if which == "cur":
                        entry |= {"root_level": int(t.pages[root.row].level), "role": f"{self.bits.role(root.role, nx=vcpu.long_mode):x}"}
                    entry["pgd"] = f"{root.pgd:x}"
                    if root.row in seen:
                        found.append({**entry, "root": f"same as {seen[root.row]}"})
                        continue
                    seen[root.row] = f"{vcpu.index} {name} {which}"
                    walked = listing.walk(t, root.row, hide)
                    entry |= {
                        "root_role": f"{named(root.row):x}", "direct": int(role & ROLE_IS_DIRECT != 0),
                        "guest_mode": int(role & ROLE_GUEST_MODE != 0),
                        "root_invalid": int(role & ROLE_INVALID != 0),
                        "leafs": listing.leafs(walked, self.bits, mapped=name == "guest_mmu"),
                        "tables": listing.tables(t, walked, named),
                    }  # fmt: skip
                    other = listing.other(walked, self.bits)
                    found.append({**entry, "other": other} if other else entry)
        return found

    def slots(self) -> list[dict[str, Any]]:
        """Return every memslot: numbers, lpage_info counters and dirty bitmap as runs."""
        return self.memslots.records()

    def check(self) -> None:
        """Scan the invariants of tables, counters and logging state; InvariantError names the first that does not hold."""
        check_invariants(self)

    def trace_events(self, on: bool) -> None:
        """Record tracepoints from now on, or stop to."""
        self.mmu.log.tracing, self.mmu.log.bits = on, self.bits
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
