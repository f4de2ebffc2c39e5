"""The state of one VM and of its vCPUs, KVM's struct kvm and struct kvm_vcpu, and what the host's MMU notifiers do to it."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.arrays import reserve as memory
from spte.arrays.mode import mode_of
from spte.arrays.records import Records
from spte.arrays.slots import READONLY, Slots
from spte.arrays.tables import COUNTERS, KVM, PAE_ROOT, SharedTables
from spte.arrays.vcpu import KVM_VCPU, LOG_COLUMNS, NEEDBREAK, PIECE, REQUESTS, STAMP, WALKS_AHEAD, Vcpu
from spte.cpu.run_shared import has_exited, request_exit
from spte.errors import ClosedError, KernelWarning
from spte.host.backing import backings_at
from spte.host.lock import ExclusiveLock
from spte.host.mmu_notifier import MmuNotifier, Ranges, host_write
from spte.host.pages import HOST_EFAULT
from spte.kernel_bits import KernelBits, kernel_bits
from spte.mmu.mark_dirty import U32_MASK, mark_dirty
from spte.observe.listing import KeptRoot
from spte.platform import PAGE_SIZE, Platform
from spte.policy import Policy
from spte.vm.memslots import Memslot, Memslots
from spte.vm.mmu import Mmu
from spte.vm.modes.state import Interrupted, NestedState
from spte.vm.root_cache import VcpuMmu

LOG_EVENTS = 1 << 14
CACHE_LINE = 128  # bytes: two lines, as a CPU fetches its neighbour too


def _own(dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """Return `count` zeroed elements on cache lines that no other vCPU writes."""
    around = -(-CACHE_LINE // np.dtype(dtype).itemsize)
    return np.zeros(count + 2 * around, dtype)[around : around + count]


class KvmVcpu:
    """The state of one vCPU: KVM's struct kvm_vcpu.

    Parameters
    ----------
    kvm : Kvm
        Its VM, which is not kept.
    index : int
        Number of the vCPU.
    """

    def __init__(self, kvm: Kvm, index: int) -> None:
        self.index = index
        self.exclusive = kvm.exclusive
        self.arrays = Vcpu(
            vcpu=_own(KVM_VCPU, 1), pml=_own(np.uint64, 512),
            ring=np.zeros((kvm.ring_entries, 2), np.uint64), log=np.zeros((0, LOG_COLUMNS), np.uint64),
            walked=_own(np.uint64, 2 * WALKS_AHEAD), requests=_own(np.int64, REQUESTS), memory=np.zeros(0, np.uint64),
        )  # fmt: skip
        reg = self.arrays.vcpu[0]
        reg.l1_pml_gfn, reg.l1_pml_index, reg.piece = -1, 511, PIECE
        reg.pml_index, reg.root, reg.pgd, reg.ring_size = 511, -1, -1, kvm.ring_entries
        reg.soft_limit = kvm.ring_entries - 64 - kvm.platform.cpu_dirty_log_size
        self.mmu = VcpuMmu(kvm.mmu.first_role, kvm.mmu.mode)
        self.nested = NestedState()
        self.cr3: int | None = None  # bytes; None: the guest's paging is off, or its tables do not matter
        self.pml01 = kvm.pml_wanted  # the PML control while L1 runs
        self.long_mode = False  # the guest has its paging on
        self.smm: Interrupted | None = None  # the vCPU is in system management mode
        self.in_guest = False  # a run has ended without an exit: vcpu->mode is IN_GUEST_MODE
        self.arrays.requests[STAMP] = index
        kvm.exclusive.kicked.append(self.arrays.requests[NEEDBREAK : NEEDBREAK + 1])
        self.mutex = threading.RLock()  # one thread's at a time: vcpu->mutex
        self._beside: tuple[SharedTables, Slots] | None = None
        self.update_requested = False  # KVM_REQ_UPDATE_CPU_DIRTY_LOGGING
        self.sync_requested = False  # KVM_REQ_MMU_SYNC

    @property
    def in_l2(self) -> bool:
        """The vCPU runs L2: is_guest_mode."""
        return self.nested.l2 is not None

    @property
    def as_id(self) -> int:
        """Address space whose memslots the vCPU runs on: 1 in system management mode, kvm_arch_vcpu_memslots_id."""
        return int(self.smm is not None)

    def beside(self, kvm: Kvm) -> tuple[SharedTables, Slots]:
        """Return the VM's page tables and memslots for a run beside others: counts, free rows and scratch are the vCPU's own."""
        s = kvm.memslots.spaces[0]
        if self._beside is None:
            t, own = kvm.mmu.tables, _own(KVM, 1)
            own["rows"] = len(t.pages)
            shared = kvm.shared_tables._replace(kvm=own, leaf_rows=memory.reserve(np.uint32, len(t.leaf_rows)))
            self._beside = shared, s._replace(memslots=s.memslots.copy())
        self._beside[1].memslots[:] = s.memslots
        return self._beside

    def keep_log(self, on: bool) -> None:
        """Record events of the coming accesses, or stop to."""
        self.arrays = self.arrays._replace(log=np.zeros((LOG_EVENTS if on else 0, LOG_COLUMNS), np.uint64))
        self.arrays.vcpu[0].logged = 0


class Kvm:
    """The state of one VM: KVM's struct kvm. What ioctls do with it stands in the modules above.

    Parameters
    ----------
    platform : Platform
        What the CPU gives.
    policy : Policy
        What the kernel version does.
    manual : int
        Argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: manual_dirty_log_protect.
    ring_entries : int
        Entries of each vCPU's dirty ring; 0 = bitmaps.
    """

    def __init__(self, platform: Platform, policy: Policy, manual: int, ring_entries: int) -> None:
        self.platform = platform
        self.policy = policy
        self.manual = manual
        self.ring_entries = ring_entries
        self.memslots = Memslots(policy.user_mem_slots, gpa_limit=policy.slot_gpa_limit, rmaps=not platform.tdp_mmu)
        self.mmu = Mmu(platform, policy, mode_of(platform, policy, manual), self.memslots)
        self.exclusive = ExclusiveLock(self.mmu.tables.kvm["needbreak"])
        self.nr_memslots_dirty_logging = 0
        self.kick_wait_s = 0.0  # how long harvests beside vCPUs have waited for them
        self.vcpus: tuple[KvmVcpu, ...] = ()
        self.vcpus_in_guest = 0
        self.counting = threading.Lock()  # held while counts of the VM change beside others
        self.shared_tables = SharedTables(*self.mmu.tables)
        self.closed = False
        self._warned: set[str] = set()
        self._to_warn: list[str] = []

    @property
    def pml_wanted(self) -> bool:
        """VCPUs that run L1 are to log by PML."""
        return self.platform.pml and (self.policy.pml_control == "always" or self.nr_memslots_dirty_logging > 0)

    @property
    def bits(self) -> KernelBits:
        """How the kernel of the VM's policy has its SPTEs and roles; the arena itself has one layout."""
        return kernel_bits(self.platform, self.policy)

    def role_of(self, vcpu: int, root: int) -> Callable[[int], int]:
        """Return a function that gives the role of a row at or below a root of `vcpu` as the kernel has it."""
        t, bits, nx = self.mmu.tables, self.bits, self.vcpus[vcpu].long_mode

        def role(row: int) -> int:
            shadow = int(t.pages[row].shadow)
            return bits.role(int(t.pages[row].role), tdp=not shadow and row != root, pae=shadow == PAE_ROOT, nx=nx)

        return role

    @property
    def vcpu_arrays(self) -> list[Vcpu]:
        """The arrays of each vCPU."""
        return [vcpu.arrays for vcpu in self.vcpus]

    def kept_roots(self) -> Iterator[KeptRoot]:
        """Yield every root that a vCPU keeps."""
        for vcpu in self.vcpus:
            mmu = vcpu.mmu
            for name, cache in (("root_mmu", mmu.root_mmu), ("guest_mmu", mmu.guest_mmu)):
                for which, root in cache:
                    active = cache is mmu.active and which == "cur"
                    role, role_of = self.bits.role(root.role, nx=vcpu.long_mode), self.role_of(vcpu.index, root.row)
                    yield KeptRoot(vcpu.index, name, which, active, root.row, role, root.pgd, role_of)

    def trace(self, *, events: bool | None = None, hardware: bool | None = None) -> None:
        """Record tracepoints, or what the hardware logs, from now on, or stop to; None: as before."""
        log = self.mmu.log
        log.tracing, log.bits = log.tracing if events is None else events, self.bits
        log.hardware = log.hardware if hardware is None else hardware
        for vcpu in self.vcpus:
            vcpu.keep_log(log.on)

    def count(self, own: Records) -> None:
        """Add the counts of `own`, which are 0 then, to the VM's."""
        total, part = (record.view(np.int64) for record in (self.mmu.tables.kvm, own))
        with self.counting:
            total[COUNTERS] += part[COUNTERS]
        part[COUNTERS] = 0

    def kick_and_wait(self) -> None:
        """Make every vCPU that runs beside others exit once; return when each has: kvm_make_all_cpus_request."""
        start = time.perf_counter()
        asked = [(requests, request_exit(requests)) for requests in (v.requests for v in self.vcpu_arrays)]
        for requests, request in asked:
            while not has_exited(requests, request):
                time.sleep(0)
        self.kick_wait_s += time.perf_counter() - start

    def check_alive(self) -> None:
        """Raise ClosedError if the VM was closed."""
        if self.closed:
            raise ClosedError("the VM was closed; make a new one")

    def change(self, *, manual: int | None = None, policy: Policy | None = None) -> None:
        """Replace manual protect or the policy; vCPUs take it over at their next entry."""
        self.manual = self.manual if manual is None else manual
        self.policy = policy or self.policy
        self.mmu.set_mode(self.policy, mode_of(self.platform, self.policy, self.manual))

    def count_logging(self, change: int) -> None:
        """Count a slot in or out of the logging ones: kvm_mmu_update_cpu_dirty_logging.

        Between 0 and 1 every vCPU is asked to update its PML control.
        """
        self.nr_memslots_dirty_logging += change
        first_or_last = change != 0 and self.nr_memslots_dirty_logging == max(change, 0)
        if first_or_last and self.platform.pml and self.policy.pml_control == "logging-slots":
            self.mmu.tables.kvm[0].cpu_dirty_logging_requests += len(self.vcpus)
            for vcpu in self.vcpus:
                vcpu.update_requested = True

    def advance_generation(self, as_id: int, step: int) -> None:
        """Move the generation of memslots on: kvm_mmu_invalidate_mmio_sptes. Every SPTE is dropped when that of MMIO SPTEs wraps."""
        if self.memslots.advance_generation(as_id, step) % self.bits.mmio_generations == 0:
            self.mmu.zap_all()

    # -- MMU notifiers ----------------------------------------------------------------------------------------------------

    def invalidate_range(self, ranges: Ranges) -> None:
        """Drop every SPTE of `ranges` of host pages, one notifier range together: kvm_mmu_notifier_invalidate_range_start.

        One flush if there was one.
        """
        mapped = (part for hpage, count in ranges for part in self.memslots.mapping(hpage, count))
        dropped = sum(self.mmu.zap_gfns(*part) for part in mapped)
        if dropped:
            self.mmu.flush()

    def clear_young(self, hpage: int, count: int) -> None:
        """Take the accessed state of host pages, page by page: kvm_mmu_notifier_clear_flush_young.

        A flush for each page that had it, if the policy flushes.
        """
        for page in range(hpage, hpage + count):
            young = sum(self.mmu.age_gfns(*part, clear=True) for part in self.memslots.mapping(page, 1))
            if young and self.policy.aging_flush:
                self.mmu.flush()

    def host_write(self, hpage: int) -> int:
        """Make the host map `hpage` writable for this VM; returns what `spte.host.mmu_notifier.host_write` does."""
        users: set[MmuNotifier] = {user for backing in backings_at(hpage * PAGE_SIZE, PAGE_SIZE) for user in backing.users}
        return host_write(users | {self}, hpage)

    def write_guest_page(self, gfn: int, vcpu: int | None) -> bool:
        """Write page `gfn` as KVM does: dirty in the log of its slot, no SPTE: kvm_vcpu_write_guest_page.

        `vcpu` is the one that runs, None if none does: kvm_write_guest_page. Returns whether there was a writable slot and host page.
        """
        slot = self.memslots.at(gfn, self.vcpus[vcpu].as_id if vcpu is not None else 0)
        if slot is None or slot.flags & READONLY or self.host_write(slot.hpage_of(gfn)) == HOST_EFAULT:
            return False
        if vcpu is None:
            self._mark_without_vcpu(slot, gfn)
            return True
        s, k = self.memslots.row_of(slot)
        v = self.vcpus[vcpu].arrays
        reg = v.vcpu[0]
        full = slot.logs and 0 < reg.ring_size <= (reg.dirty_index - reg.reset_index) & U32_MASK
        mark_dirty(self.mmu.tables, s, v, np.int64(k), np.int64(gfn))
        self.mmu.log.collect(vcpu, v)
        if full:
            self._warn_once(f"a full dirty ring is overrun: KVM's write of gfn {gfn:#x} has taken the place of the oldest entry, now lost")
        return True

    def _mark_without_vcpu(self, slot: Memslot, gfn: int) -> None:
        """Mark a page that KVM wrote while no vCPU runs: mark_page_dirty_in_slot without kvm_get_running_vcpu.

        A ring belongs to a vCPU, so that a VM with rings loses the page: x86 has no KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP.
        """
        lost = slot.logs and (slot.bitmap < 0 or self.policy.write_without_vcpu == "dropped")
        if self.policy.write_without_vcpu != "marked" or lost:
            self._warn_once("KVM wrote guest memory while no vCPU ran" + (f": gfn {gfn:#x} is in no dirty log" if lost else ""))
        if slot.logs and not lost:
            page = gfn - slot.base_gfn
            self.memslots.bitmap(slot)[page >> 6] |= np.uint64(1) << np.uint64(page & 63)
            self.mmu.tables.kvm[0].dirty_marks += 1

    # -- warnings ---------------------------------------------------------------------------------------------------------

    def _warn_once(self, text: str) -> None:
        """Warn at the end of the ioctl, if the VM has not warned of its like: WARN_ON_ONCE."""
        kind = text.partition(":")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            self._to_warn.append(text)

    def give_warnings(self, stacklevel: int) -> None:
        """Emit as KernelWarning what the last ioctl has to warn of; `stacklevel` as for `warnings.warn`. The caller holds no lock."""
        while self._to_warn:
            warnings.warn(self._to_warn.pop(), KernelWarning, stacklevel=stacklevel + 1)
