"""The virtual machine: memslots, vCPUs and tables behind KVM's dirty-log interface, errno for errno."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any, TypeVar, overload

from spte._arguments import flag, index, instance, integer, spell
from spte.arrays.records import U64s
from spte.errors import CapabilityError, ClearRangeError, DirtyLoggingLeak, MmuPagesError, SlotIdError, SlotRangeError
from spte.host.backing import Backing
from spte.host.lock import share
from spte.platform import Platform
from spte.policy import Policy
from spte.vm import capabilities, dirty_log
from spte.vm import set_memory_region as region
from spte.vm.kvm import Kvm
from spte.vm.observed import Observed
from spte.vm.vcpu import VirtualCpu
from spte.vm.vcpu_run import Ioctl, kick

Buffer = TypeVar("Buffer")
MIN_MMU_PAGES = 64  # KVM_MIN_ALLOC_MMU_PAGES


class VM(Observed):
    """A virtual machine with KVM's dirty logging.

    Many threads may use it: its vCPUs run side by side and beside GET, CLEAR and RESET; other calls, and those of `spte.mm` on its memory,
    have the vCPUs leave the guest first. Two VMs run side by side, unless they share a `Backing`. See docs/threads.md.

    Parameters
    ----------
    platform : str or Platform
        What the CPU gives: ``ept-pml``, ``ept-nopml``, ``ept-noad``, ``npt``, ``npt-pml``; with ``-rmap`` direct roots are the shadow
        MMU's (``tdp_mmu=N``); ``shadow``: neither EPT nor NPT.
    policy : str or Policy
        What the kernel version does: a mainline version (``5.10`` to ``7.2``), ``series``, or a value with single decisions replaced.
    vcpus : int
        vCPUs that are made with it, from 0 to what KVM_CAP_MAX_VCPUS says; `create_vcpu` makes more.
    manual : int
        Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: 0, 1 (manual protect) or 3 (and initially-set).
    ring_bytes : int
        Dirty ring of each vCPU, bytes; 0 = bitmaps. Its low 32 bits count, as in the kernel.

    Raises
    ------
    KvmError
        EINVAL or E2BIG, with the value and the way out; no VM is made.

    Notes
    -----
    Every call refuses an argument of a wrong type with TypeError, a number out of range with a subclass of KvmError, and has changed
    nothing then.
    """

    def __init__(
        self, platform: str | Platform = "ept-pml", policy: str | Policy = "6.12", *, vcpus: int = 1, manual: int = 0, ring_bytes: int = 0
    ) -> None:
        platform, policy, vcpus, manual, ring_bytes = capabilities.arguments(
            platform, policy, vcpus=vcpus, manual=manual, ring_bytes=ring_bytes
        )
        super().__init__(Kvm(platform, policy, manual, ring_bytes // capabilities.RING_ENTRY_BYTES))
        self.vcpus: tuple[VirtualCpu, ...] = ()
        for _ in range(vcpus):
            self.create_vcpu()
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

    # -- vCPUs ------------------------------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int | None = None) -> VirtualCpu:
        """Make one more vCPU, the last of `vcpus`: KVM_CREATE_VCPU. While a slot logs on PML hardware it begins with PML on.

        Parameters
        ----------
        vcpu_id : int, optional
            Its id, below what KVM_CAP_MAX_VCPU_ID says; the first one that is free if none is given.

        Raises
        ------
        CapabilityError
            EINVAL: an id out of range; as many vCPUs as KVM_CAP_MAX_VCPUS says exist.
        VcpuExistsError
            EEXIST: another vCPU has that id.
        """
        with self.exclusive:
            self.kvm.check_alive()
            taken = {vcpu.vcpu_id for vcpu in self.vcpus}
            vcpu = VirtualCpu(self.kvm, len(taken), capabilities.new_vcpu_id(self.policy, taken, vcpu_id))
            vcpu.keep_log(self.kvm.mmu.log.on)
            self.kvm.vcpus = self.vcpus = (*self.vcpus, vcpu)
            return vcpu

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
        given = region.typed(slot, gpa, size, backing, hva, offset, flags)
        share(self.exclusive, *(memory.exclusive for memory in region.memory_of(*given[2:6])))
        with Ioctl(self.kvm):
            region.set_memory_region(self.kvm, *given)

    # -- dirty log --------------------------------------------------------------------------------------------------------

    @overload
    def get_dirty_log(self, slot: int, out: None = None) -> U64s: ...
    @overload
    def get_dirty_log(self, slot: int, out: Buffer) -> Buffer: ...
    def get_dirty_log(self, slot: int, out: Any = None) -> Any:
        """Return which pages of `slot` are dirty: KVM_GET_DIRTY_LOG.

        Without manual protect the pages are clean afterwards and their next write is seen again. As with KVM, that has happened
        before `out` is looked at: a GET with a bad buffer loses its bits.

        Parameters
        ----------
        slot : int
            as_id << 16 | id.
        out : ndarray of uint64[ceil(npages / 64)], or any other C-contiguous buffer of at least as many bytes, optional
            Receives the bitmap, bit 0 of word 0 = first page, from its front; mutated and returned.

        Returns
        -------
        ndarray of uint64[ceil(npages / 64)]
            `out`, or a new array.

        Raises
        ------
        DirtyRingInUseError, SlotIdError, NoDirtyLogError
            ENXIO, EINVAL, ENOENT; nothing is changed.
        BufferFaultError
            EFAULT: `out` is shorter, or read-only.
        """
        slot, user = integer(slot, "slot", SlotIdError), None if out is None else dirty_log.bytes_of(out, "out")
        with dirty_log.harvest(self.kvm) as beside:
            bitmap = dirty_log.get(self.kvm, slot, user, beside)
        return bitmap if out is None else out

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
        bitmap : ndarray of uint64[ceil(num_pages / 64)], or any other C-contiguous buffer of at least as many bytes
            Bit 0 of word 0 = `first_page`; only bits that are dirty take effect. Not changed.

        Raises
        ------
        DirtyRingInUseError, SlotIdError, ClearRangeError, NoDirtyLogError, BufferFaultError
            ENXIO, EINVAL, EINVAL, ENOENT, EFAULT (`bitmap` is shorter); nothing is changed.
        """
        slot, user = integer(slot, "slot", SlotIdError), dirty_log.bytes_of(bitmap, "bitmap")
        first_page, num_pages = integer(first_page, "first_page", ClearRangeError), integer(num_pages, "num_pages", ClearRangeError)
        with dirty_log.harvest(self.kvm) as beside:
            dirty_log.clear(self.kvm, slot, first_page, num_pages, user, beside)

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
        with dirty_log.harvest(self.kvm) as beside:
            return dirty_log.reset_rings(self.kvm, beside)

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
            EINVAL (E2BIG for a ring that is too large); nothing is changed. A ring is given once, and before the first vCPU.
        """
        cap, arg0 = capabilities.enabled_number(name), integer(arg0, "arg0", CapabilityError)
        with Ioctl(self.kvm):
            capabilities.enable_cap(self.kvm, cap, arg0)

    def check_extension(self, cap: str | int) -> int:
        """Return what KVM_CHECK_EXTENSION says of capability `cap`, a name or a number: 0 = unknown."""
        return capabilities.check_extension(self.kvm, cap)

    def set_param(self, name: str, value: bool) -> None:
        """Set module parameter `name` (``eager_page_split`` or ``nx_huge_pages``) to `value`; nx_huge_pages zaps everything."""
        if instance(name, "name", str, "the name of a parameter") not in ("eager_page_split", "nx_huge_pages"):
            raise CapabilityError(f"parameter {spell(name)} can not be set; take eager_page_split or nx_huge_pages")
        value = flag(value, "value")
        with Ioctl(self.kvm):
            capabilities.set_param(self.kvm, name, value)

    def kernel_write(self, gfn: int, vcpu: int | None = 0) -> None:
        """Write page `gfn` as KVM itself does (string I/O, clocks) while `vcpu` runs: dirty in the log of its slot, no SPTE, no fault.

        `vcpu` None: while none runs, as from an ioctl of the VM. A VM with dirty rings loses such a page, because x86 has no
        KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP; policy field ``write_without_vcpu`` says what becomes of it in a bitmap. Nothing asks a vCPU
        to exit when KVM's writes fill its ring: the one after the last entry overwrites the oldest.

        Warns
        -----
        KernelWarning
            Once a VM each, where the kernel warns once: a write without a vCPU; a ring that is overrun.

        Raises
        ------
        SlotRangeError, ArgumentError
            EINVAL: a gfn beyond 52 bits of address; no such vCPU; nothing is changed.
        """
        gfn, vcpu = integer(gfn, "gfn", SlotRangeError, 0, 1 << 40), None if vcpu is None else self._index(vcpu)
        with Ioctl(self.kvm):
            self.kvm.write_guest_page(gfn, vcpu)

    def set_tss_addr(self, gpa: int) -> None:
        """Give KVM three pages at `gpa` (bytes) for a TSS, as internal memslots: KVM_SET_TSS_ADDR; KvmError if they are not free."""
        gpa = integer(gpa, "gpa", SlotRangeError, 0, region.TSS_END + 1)
        with Ioctl(self.kvm):
            region.set_tss_addr(self.kvm, gpa)

    def set_nr_mmu_pages(self, n: int) -> None:
        """Limit the shadow pages to `n`: KVM_SET_NR_MMU_PAGES; MmuPagesError (EINVAL) below 64. Tables of the TDP MMU do not count."""
        if index(n, "n") < MIN_MMU_PAGES:
            raise MmuPagesError(f"n={spell(n)} is below {MIN_MMU_PAGES}, the least that KVM works with")

    # -- life -------------------------------------------------------------------------------------------------------------

    def close(self) -> int:
        """Destroy the VM: every SPTE is dropped without a flush, nobody can run.

        Returns
        -------
        int
            Slots that still logged: 0 if userspace turned logging off first. With the policy field ``warn_on_destroy`` anything else
            emits a `DirtyLoggingLeak` warning.
        """
        with self.exclusive:
            n, leaks = self.nr_memslots_dirty_logging, False
            if not self.kvm.closed:
                kick(self.kvm)
                self.mmu.zap_all()
                self.kvm.closed = True
                leaks = n > 0 and self.policy.warn_on_destroy
        if leaks:
            warnings.warn(f"VM destroyed while {n} memslots log; clear their LOG_DIRTY_PAGES first", DirtyLoggingLeak, stacklevel=2)
        return n

    def __enter__(self) -> VM:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
