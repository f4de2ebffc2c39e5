"""The virtual machine: memslots, vCPUs and tables behind KVM's dirty-log interface, errno for errno."""

from __future__ import annotations

import dataclasses
import warnings
from types import TracebackType

from spte.arrays.context import CPU_DIRTY_LOGGING_REQUESTS, U64s
from spte.arrays.mode import mode_of
from spte.bits import ROLE_PAGING_OFF
from spte.errors import CapabilityError, ClosedError, DirtyLoggingLeak, MmuPagesError
from spte.host.backing import Backing
from spte.platform import SHADOW, Platform, named
from spte.policy import Policy
from spte.vm import dirty_log, notifier
from spte.vm import set_memory_region as region
from spte.vm.capabilities import MANUAL_PROTECT, check_dirty_ring, check_extension, check_manual_protect, number
from spte.vm.memslots import Memslots
from spte.vm.mmu import Mmu
from spte.vm.observable import Observable
from spte.vm.shadow_paging import ShadowPaging
from spte.vm.vcpu import VirtualCpu

MAX_VCPUS = 1024  # KVM_MAX_VCPUS of x86
TSS_PAGES = 3
MIN_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES


class VM(Observable):
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
        self.platform = named(platform) if isinstance(platform, str) else platform
        self.policy = Policy.named(policy) if isinstance(policy, str) else policy
        if not 1 <= vcpus <= MAX_VCPUS:
            raise CapabilityError(f"vcpus={vcpus} is not in 1..{MAX_VCPUS}")
        check_manual_protect(manual)
        if ring_bytes:
            check_dirty_ring(ring_bytes, self.platform.cpu_dirty_log_size, self.policy)
        self.manual = manual
        self.memslots = Memslots(self.policy.user_mem_slots, gpa_limit=self.policy.slot_gpa_limit, rmaps=not self.platform.tdp_mmu)
        mmu = ShadowPaging if self.platform.paging == SHADOW else Mmu
        self.mmu = mmu(self.platform, self.policy, mode_of(self.platform, self.policy, manual), self.memslots)
        self.first_role = ROLE_PAGING_OFF | 3 if self.platform.paging == SHADOW else self.mmu.direct_role
        self.nr_memslots_dirty_logging = 0
        self._closed = False
        self.vcpus = tuple(VirtualCpu(self, i, ring_bytes // 16) for i in range(vcpus))
        self.mmu.vcpus = self.vcpus

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
            Host virtual address instead of `backing` and `offset`.

        Raises
        ------
        KvmError
            The first broken rule in KVM's order: EINVAL, EEXIST (overlap), ENOMEM. Nothing is changed.
        """
        self._kick()
        change, old, new = region.plan(self.memslots, self.platform.gpa_bits, slot, gpa, size, backing, hva, offset, flags)
        if change == region.NOTHING:
            return
        was, now = bool(old and old.logs), bool(new and new.logs)
        if old is not None and change in (region.DELETE, region.MOVE):
            self.mmu.zap_all()
            self.memslots.remove(old)
        if change == region.FLAGS_ONLY:
            assert old is not None
            old.flags = flags
            new = old
        if old is not None and was and not now:
            self.memslots.free_bitmap(old)
        if new is not None and new is not old:
            new.bitmap = old.bitmap if old is not None else -1
            self.memslots.insert(new)
            if new.backing is not None:
                new.backing.users.add(self)
        if new is not None:
            if now and not was and not self.has_ring:
                self.memslots.allocate_bitmap(new, all_set=self.manual == 3)
            self.memslots.update(new)
        self._count_logging(now - was)
        self._advance_generation(slot >> 16, 4 if change in (region.DELETE, region.MOVE) else 2)
        if change == region.FLAGS_ONLY and new is not None:
            if now:
                dirty_log.arm_slot(self, new)
            else:
                dirty_log.collapse(self, new)

    def _count_logging(self, change: int) -> None:
        """Count a slot in or out of the logging ones; between 0 and 1 every vCPU is asked to update its PML control."""
        self.nr_memslots_dirty_logging += change
        first_or_last = change != 0 and self.nr_memslots_dirty_logging == max(change, 0)
        if first_or_last and self.platform.pml and self.policy.pml_control == "logging-slots":
            self.mmu.tables.meta[CPU_DIRTY_LOGGING_REQUESTS] += len(self.vcpus)
            for vcpu in self.vcpus:
                vcpu.update_requested = True

    def _advance_generation(self, as_id: int, step: int) -> None:
        if self.memslots.advance_generation(as_id, step) % self.bits.mmio_generations == 0:
            self.mmu.zap_all()

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
        self._kick()
        return dirty_log.get(self, slot, out)

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
        self._kick()
        dirty_log.clear(self, slot, first_page, num_pages, bitmap)

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
        self._kick()
        return dirty_log.reset_rings(self)

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
        self._kick()
        if number(name) == MANUAL_PROTECT:
            check_manual_protect(arg0)
            self.manual = arg0
            self._set_mode()
            if arg0 != 3:
                self.memslots.leave_initially_set()
            return
        check_dirty_ring(arg0, self.platform.cpu_dirty_log_size, self.policy)
        raise CapabilityError(f"ring of {arg0} bytes comes too late: vCPUs exist; pass ring_bytes={arg0} when making the VM")

    def check_extension(self, cap: str | int) -> int:
        """Return what KVM_CHECK_EXTENSION says of capability `cap`, a name or a number: 0 = unknown."""
        return check_extension(cap, self.policy, shadow=self.platform.paging == SHADOW)

    def set_param(self, name: str, value: bool) -> None:
        """Set module parameter `name` (``eager_page_split`` or ``nx_huge_pages``) to `value`; nx_huge_pages zaps everything."""
        if name not in ("eager_page_split", "nx_huge_pages"):
            raise CapabilityError(f"parameter {name!r} can not be set; take eager_page_split or nx_huge_pages")
        self._kick()
        if getattr(self.policy, name) != value:
            self.policy = dataclasses.replace(self.policy, **{name: value})  # type: ignore[arg-type]
            self._set_mode()
            if name == "nx_huge_pages":
                self.mmu.zap_all()

    def _set_mode(self) -> None:
        self.mmu.policy, self.mmu.mode = self.policy, mode_of(self.platform, self.policy, self.manual)

    @property
    def pml_wanted(self) -> bool:
        """VCPUs that run L1 are to log by PML."""
        return self.platform.pml and (self.policy.pml_control == "always" or self.nr_memslots_dirty_logging > 0)

    def kernel_write(self, gfn: int, vcpu: int = 0) -> None:
        """Write page `gfn` as KVM itself does (string I/O, clocks) while `vcpu` runs: dirty in the log of its slot, no SPTE, no fault."""
        self._kick()
        notifier.kernel_write(self, gfn, vcpu)

    def set_tss_addr(self, gpa: int) -> None:
        """Give KVM three pages at `gpa` (bytes) for a TSS, as internal memslots: KVM_SET_TSS_ADDR; KvmError if they are not free."""
        self._kick()
        for slot in region.plan_internal(self.memslots, self.platform.gpa_bits, gpa, Backing("4k", TSS_PAGES * 4096)):
            self.memslots.insert(slot)
            self._advance_generation(slot.as_id, 2)

    def set_nr_mmu_pages(self, n: int) -> None:
        """Limit the shadow pages to `n`: KVM_SET_NR_MMU_PAGES; MmuPagesError (EINVAL) below 64. Tables of the TDP MMU do not count."""
        if n < MIN_MMU_PAGES:
            raise MmuPagesError(f"n={n} is below {MIN_MMU_PAGES}, the least that KVM works with")

    # -- life -------------------------------------------------------------------------------------------------------------

    @property
    def has_ring(self) -> bool:
        """VCPUs log to dirty rings."""
        return len(self.vcpus[0].arrays.ring) > 0

    def alive(self) -> None:
        """Raise ClosedError if the VM was closed."""
        if self._closed:
            raise ClosedError("the VM was closed; make a new one")

    def _kick(self) -> None:
        self.alive()  # an ioctl finds no vCPU in the guest
        for vcpu in self.vcpus:
            vcpu.end_stay()

    def close(self) -> int:
        """Destroy the VM: every SPTE is dropped without a flush, nobody can run.

        Returns
        -------
        int
            Slots that still logged: 0 if userspace turned logging off first. With the policy field ``warn_on_destroy`` anything else
            emits a `DirtyLoggingLeak` warning.
        """
        if not self._closed:
            self._kick()
            self.mmu.zap_all()
            self._closed = True
            if self.nr_memslots_dirty_logging and self.policy.warn_on_destroy:
                n = self.nr_memslots_dirty_logging
                warnings.warn(f"VM destroyed while {n} memslots log; clear their LOG_DIRTY_PAGES first", DirtyLoggingLeak, stacklevel=2)
        return self.nr_memslots_dirty_logging

    def __enter__(self) -> VM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
