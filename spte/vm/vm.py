"""The virtual machine: memslots, vCPUs and tables behind KVM's dirty-log interface, errno for errno."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from spte.arrays.records import U64s
from spte.errors import CapabilityError, DirtyLoggingLeak, MmuPagesError
from spte.host.backing import Backing
from spte.observe import invariants, listing, stats
from spte.platform import Platform, named
from spte.policy import Policy
from spte.vm import capabilities, dirty_log
from spte.vm import set_memory_region as region
from spte.vm.kvm import Kvm
from spte.vm.vcpu import VirtualCpu
from spte.vm.vcpu_run import kick

MAX_VCPUS = 1024  # KVM_MAX_VCPUS of x86
MIN_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES


class VM:
    """A virtual machine with KVM's dirty logging.

    Parameters
    ----------
    platform : str or Platform
        What the CPU gives: ``ept-pml``, ``ept-nopml``, ``ept-noad``, ``npt``, ``npt-pml``; with ``-rmap`` direct roots are the shadow
        MMU's (``tdp_mmu=N``); ``shadow``: neither EPT nor NPT.
    policy : str or Policy
        What the kernel version does: a mainline version (``5.10`` to ``7.2``), ``series``, or a value with single decisions replaced.
    vcpus : int
        Number of vCPUs, 1..1024.
    manual : int
        Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0, 1 (manual protect) or 3 (and initially-set).
    ring_bytes : int
        Dirty ring of each vCPU, bytes; 0 = bitmaps.

    Raises
    ------
    KvmError
        EINVAL or E2BIG, with the value and the way out; no VM is made.
    """

    def __init__(
        self, platform: str | Platform = "ept-pml", policy: str | Policy = "6.12", *, vcpus: int = 1, manual: int = 0, ring_bytes: int = 0
    ) -> None:
        platform = named(platform) if isinstance(platform, str) else platform
        policy = Policy.named(policy) if isinstance(policy, str) else policy
        if not 1 <= vcpus <= MAX_VCPUS:
            raise CapabilityError(f"vcpus={vcpus} is not in 1..{MAX_VCPUS}")
        capabilities.check_manual_protect(manual)
        if ring_bytes:
            capabilities.check_dirty_ring(ring_bytes, platform.cpu_dirty_log_size, policy)
        self.kvm = Kvm(platform, policy, manual, ring_bytes // capabilities.RING_ENTRY_BYTES)
        self.vcpus = tuple(VirtualCpu(self.kvm, i) for i in range(vcpus))
        self.kvm.vcpus = self.vcpus
        self.platform, self.memslots, self.mmu = platform, self.kvm.memslots, self.kvm.mmu

    @property
    def policy(self) -> Policy:
        """What the kernel version does; `set_param` changes it."""
        return self.kvm.policy

    @property
    def manual(self) -> int:
        """Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2."""
        return self.kvm.manual

    @property
    def nr_memslots_dirty_logging(self) -> int:
        """How many slots log."""
        return self.kvm.nr_memslots_dirty_logging

    # -- memslots ---------------------------------------------------------------------------------------------------------

    def set_memory_region(
        self, slot: int, gpa: int, size: int, backing: Backing | None = None, *, offset: int = 0, flags: int = 0, hva: int | None = None
    ) -> None:
        """Create, delete (size 0), move or re-flag a memslot: KVM_SET_USER_MEMORY_REGION.

        Parameters
        ----------
        slot : int
            as_id << 16 | id.
        gpa, size : int
            Guest-physical address and size, bytes.
        backing : Backing, optional
            Host memory; an existing slot keeps its own if none is given.
        offset : int
            Where in `backing` the slot begins, bytes.
        flags : int
            1 LOG_DIRTY_PAGES, 2 READONLY.
        hva : int, optional
            Host virtual address instead of `backing` and `offset`, of any memory; what comes there later is without MMU notifiers.

        Raises
        ------
        KvmError
            The first broken rule in KVM's order: EINVAL, EEXIST (overlap), ENOMEM. Nothing is changed.
        """
        kick(self.kvm)
        region.set_memory_region(self.kvm, slot, gpa, size, backing, hva, offset, flags)

    # -- dirty log --------------------------------------------------------------------------------------------------------

    def get_dirty_log(self, slot: int, out: U64s | None = None) -> U64s:
        """Return which pages of `slot` are dirty: KVM_GET_DIRTY_LOG.

        Without manual protect the pages are clean afterwards and their next write is seen again. As with KVM, that has happened
        before `out` is looked at: a GET with a bad buffer loses its bits.

        Parameters
        ----------
        slot : int
            as_id << 16 | id.
        out : ndarray of uint64[ceil(npages / 64)], optional
            Receives the bitmap, bit 0 of word 0 = first page; mutated and returned.

        Returns
        -------
        ndarray of uint64[ceil(npages / 64)]
            `out`, or a new array.

        Raises
        ------
        DirtyRingInUseError, SlotIdError, NoDirtyLogError
            ENXIO, EINVAL, ENOENT; nothing is changed.
        BufferFaultError
            EFAULT: `out` is not a writable uint64 array of that size.
        """
        kick(self.kvm)
        return dirty_log.get(self.kvm, slot, out)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: U64s) -> None:
        """Clear dirty bits of `slot` and make the next write to those pages visible again: KVM_CLEAR_DIRTY_LOG.

        Parameters
        ----------
        slot : int
            as_id << 16 | id.
        first_page : int
            First page, relative to the slot, a multiple of 64.
        num_pages : int
            Pages; a multiple of 64 unless the range ends at the slot's end.
        bitmap : ndarray of uint64[ceil(num_pages / 64)]
            Bit 0 of word 0 = `first_page`; only bits that are dirty take effect. Not changed.

        Raises
        ------
        DirtyRingInUseError, SlotIdError, ClearRangeError, NoDirtyLogError, BufferFaultError
            ENXIO, EINVAL, EINVAL, ENOENT, EFAULT; nothing is changed.
        """
        kick(self.kvm)
        dirty_log.clear(self.kvm, slot, first_page, num_pages, bitmap)

    def reset_dirty_rings(self) -> int:
        """Free the ring entries that userspace marked and re-arm their pages: KVM_RESET_DIRTY_RINGS.

        Returns
        -------
        int
            Entries freed.

        Raises
        ------
        RingDisabledError
            EINVAL: the VM has no rings.
        """
        kick(self.kvm)
        return dirty_log.reset_rings(self.kvm)

    # -- capabilities and parameters --------------------------------------------------------------------------------------

    def enable_cap(self, name: str | int, arg0: int = 0) -> None:
        """Enable a capability of the VM: KVM_ENABLE_CAP.

        Parameters
        ----------
        name : str or int
            ``manual_dirty_log_protect2`` (168), ``dirty_log_ring`` (192), ``dirty_log_ring_acq_rel`` (223).
        arg0 : int
            Its argument: protect bits; ring bytes.

        Raises
        ------
        CapabilityError
            EINVAL (E2BIG for a ring that is too large); nothing is changed. A ring is always too late here: vCPUs exist.
        """
        kick(self.kvm)
        capabilities.enable_cap(self.kvm, name, arg0)

    def check_extension(self, cap: str | int) -> int:
        """Return what KVM_CHECK_EXTENSION says of capability `cap`, a name or a number: 0 = unknown."""
        return capabilities.check_extension(self.kvm, cap)

    def set_param(self, name: str, value: bool) -> None:
        """Set module parameter `name` (``eager_page_split`` or ``nx_huge_pages``) to `value`; nx_huge_pages zaps everything."""
        if name not in ("eager_page_split", "nx_huge_pages"):
            raise CapabilityError(f"parameter {name!r} can not be set; take eager_page_split or nx_huge_pages")
        kick(self.kvm)
        capabilities.set_param(self.kvm, name, value)

    def kernel_write(self, gfn: int, vcpu: int = 0) -> None:
        """Write page `gfn` as KVM itself does (string I/O, clocks) while `vcpu` runs: dirty in the log of its slot, no SPTE, no fault."""
        kick(self.kvm)
        self.kvm.write_guest_page(gfn, vcpu)

    def set_tss_addr(self, gpa: int) -> None:
        """Give KVM three pages at `gpa` (bytes) for a TSS, as internal memslots: KVM_SET_TSS_ADDR; KvmError if they are not free."""
        kick(self.kvm)
        region.set_tss_addr(self.kvm, gpa)

    def set_nr_mmu_pages(self, n: int) -> None:
        """Limit the shadow pages to `n`: KVM_SET_NR_MMU_PAGES; MmuPagesError (EINVAL) below 64. Tables of the TDP MMU do not count."""
        if n < MIN_MMU_PAGES:
            raise MmuPagesError(f"n={n} is below {MIN_MMU_PAGES}, the least that KVM works with")

    # -- what is to be seen -----------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Return KVM's statistics in the kernel's names, those of vCPUs added up; by file under ``"vm"``, ``"vcpu0"``, ..."""
        return stats.stats(self.mmu.tables, self.kvm.vcpu_arrays)

    def counters(self) -> dict[str, int]:
        """Return the model's own counts since the VM was made: SPTEs written, splits, zaps, PML entries, exits, faults."""
        return stats.counters(self.mmu.tables, self.kvm.vcpu_arrays)

    def leafs(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return leaves of the root of `vcpu` as ``[level, first_gfn, count, flags]`` runs; `hide` leaves gfns ``[a, b)`` out."""
        return listing.leafs(self._walk(vcpu, hide), self.kvm.bits)

    def tables(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return page-table pages as ``[level, gfn, count, role, tdp, nx_disallowed, unsync]`` runs; `vcpu`, `hide` as `leafs`."""
        return listing.tables(self.mmu.tables, self._walk(vcpu, hide), self.kvm.role_of(vcpu, self._root(vcpu)))

    def other(self, vcpu: int = 0, *, hide: tuple[int, int] | None = None) -> list[list[Any]]:
        """Return MMIO and frozen entries as ``[level, gfn, hex]``; `vcpu`, `hide` as `leafs`."""
        return listing.other(self._walk(vcpu, hide), self.kvm.bits)

    def _walk(self, vcpu: int, hide: tuple[int, int] | None) -> list[listing.Run]:
        return listing.walk(self.mmu.tables, self._root(vcpu), hide)

    def _root(self, vcpu: int) -> int:
        return int(self.vcpus[vcpu].arrays.vcpu[0].root)

    def roots(self, *, hide: tuple[int, int] | None = None) -> list[dict[str, Any]]:
        """Return every root that a vCPU keeps, in the shape of the nested recordings: where it is kept, its role, what it maps.

        Leaves of `guest_mmu` have L1's gfn as a fifth value. `hide` leaves gfns ``[a, b)`` out.
        """
        return listing.roots(self.mmu.tables, self.kvm.bits, self.kvm.kept_roots(), hide)

    def slots(self) -> list[dict[str, Any]]:
        """Return every memslot: numbers, lpage_info counters and dirty bitmap as runs."""
        return self.memslots.records()

    def check(self) -> None:
        """Scan the invariants of tables, counters and logging state; InvariantError names the first that does not hold."""
        spaces, logging = self.memslots.spaces, self.nr_memslots_dirty_logging
        invariants.check(self.mmu.tables, spaces, self.mmu.mode, self.kvm.vcpu_arrays, logging)

    def trace_events(self, on: bool) -> None:
        """Record tracepoints from now on, or stop to."""
        self.kvm.trace(events=on)

    def trace_hw(self, on: bool) -> None:
        """Record what the hardware logs (PML entries, full buffers) from now on, or stop to."""
        self.kvm.trace(hardware=on)

    def drain_events(self) -> list[list[Any]]:
        """Return the recorded tracepoints, ``[name, fields...]`` in order, and forget them."""
        return self.mmu.log.drain_events()

    def drain_hw(self) -> list[list[Any]]:
        """Return the recorded PML entries and full buffers in order, and forget them."""
        return self.mmu.log.drain_hw()

    # -- life -------------------------------------------------------------------------------------------------------------

    def close(self) -> int:
        """Destroy the VM: every SPTE is dropped without a flush, nobody can run.

        Returns
        -------
        int
            Slots that still logged: 0 if userspace turned logging off first. With the policy field ``warn_on_destroy`` anything else
            emits a `DirtyLoggingLeak` warning.
        """
        if not self.kvm.closed:
            kick(self.kvm)
            self.mmu.zap_all()
            self.kvm.closed = True
            if self.nr_memslots_dirty_logging and self.policy.warn_on_destroy:
                n = self.nr_memslots_dirty_logging
                warnings.warn(f"VM destroyed while {n} memslots log; clear their LOG_DIRTY_PAGES first", DirtyLoggingLeak, stacklevel=2)
        return self.nr_memslots_dirty_logging

    def __enter__(self) -> VM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
