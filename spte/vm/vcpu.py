"""One vCPU: batches of guest accesses, PML buffer, dirty ring, what stopped a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from spte.arrays import context as cx
from spte.arrays.context import LOG_COLUMNS, I64s, Vcpu, zeros
from spte.cpu.prefault import prefault
from spte.cpu.run import STAYED, STAYS, run_shadow
from spte.cpu.run import run as run_guest
from spte.errors import OutOfTablesError, PrefaultError, PrefaultHoleError, PrefaultHostError, PrefaultUnsupportedError, SlotRangeError
from spte.exits import Exit
from spte.host.pages import the_host
from spte.platform import SHADOW
from spte.vm.nested import PAGED_BITS, NestedVcpu
from spte.vm.notifier import host_write

if TYPE_CHECKING:
    from spte.vm.vm import VM

Kinds = npt.NDArray[np.uint8]
DIRTY_GFN = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])  # struct kvm_dirty_gfn
LOG_EVENTS = 1 << 14
_REASONS = {
    cx.EXIT_RING_FULL: "dirty_ring_full", cx.EXIT_MMIO: "mmio", cx.EXIT_EFAULT: "efault", cx.EXIT_GUEST_FAULT: "page_fault",
    cx.EXIT_GUEST_PML_FULL: "pml_full", cx.EXIT_INTERNAL: "internal_error",
}  # fmt: skip
_ONE_KIND = {kind: np.array([kind], np.uint8) for kind in (cx.READ, cx.WRITE, cx.EXEC)}


class VirtualCpu(NestedVcpu):
    """A vCPU of a VM; made by `spte.VM`."""

    def __init__(self, vm: VM, index: int, ring_entries: int) -> None:
        super().__init__(vm)
        self._vm = vm
        self.index = index
        self.arrays = Vcpu(
            reg=zeros(cx.REG_COLUMNS), stat=zeros(cx.STAT_COLUMNS), pml=zeros(512, np.uint64),
            ring=np.zeros((ring_entries, 2), np.uint64), log=np.zeros((0, LOG_COLUMNS), np.uint64),
            walked=zeros(2 * cx.WALKS_AHEAD, np.uint64), guest=zeros(cx.GW_COLUMNS),
        )  # fmt: skip
        self.mode = vm.mmu.mode
        reg = self.arrays.reg
        reg[cx.L1_PML_GFN], reg[cx.L1_PML_INDEX] = -1, 511
        reg[cx.PML_INDEX], reg[cx.ROOT], reg[cx.PGD], reg[cx.RING_SIZE] = 511, -1, -1, ring_entries
        reg[cx.RING_SOFT] = ring_entries - 64 - vm.platform.cpu_dirty_log_size

    def read(self, gfns: npt.ArrayLike) -> Exit | None:
        """Read each page of `gfns` in order.

        Parameters
        ----------
        gfns : array_like of any integer dtype, shape (n,)
            Guest frame numbers; not changed.

        Returns
        -------
        Exit or None
            None if every access was done, else what stopped the batch.

        Raises
        ------
        TypeError
            `gfns` is not one-dimensional of an integer dtype.
        SlotRangeError
            EINVAL: a gfn beyond the guest-physical width; nothing was accessed.
        OutOfTablesError
            ENOMEM: the arena is full; earlier accesses were done.
        """
        return self._batch(gfns, _ONE_KIND[cx.READ])

    def write(self, gfns: npt.ArrayLike) -> Exit | None:
        """Write each page of `gfns` in order; parameters and errors as `read`."""
        return self._batch(gfns, _ONE_KIND[cx.WRITE])

    def exec(self, gfns: npt.ArrayLike) -> Exit | None:
        """Fetch an instruction from each page of `gfns` in order; parameters and errors as `read`."""
        return self._batch(gfns, _ONE_KIND[cx.EXEC])

    def run(self, gfns: npt.ArrayLike, kinds: npt.ArrayLike, *, stays: bool = False) -> Exit | None:
        """Access each page of `gfns` in order as `kinds` says, as one stay in the guest; errors as `read`.

        Parameters
        ----------
        gfns : array_like of any integer dtype, shape (n,)
            Guest frame numbers; not changed.
        kinds : array_like of uint8, shape (n,)
            `spte.READ`, `spte.WRITE` or `spte.EXEC` for each access; not changed.
        stays : bool
            The guest is not left after the last access: the next batch goes on with the same stay, if no ioctl of the VM ended it.

        Returns
        -------
        Exit or None
            None if every access was done, else what stopped the batch.
        """
        each = np.array(kinds, np.uint8)
        if each.shape != np.shape(gfns) or (each > cx.EXEC).any():
            raise TypeError(f"kinds has shape {each.shape} or values above {cx.EXEC}; pass one of 0..{cx.EXEC} a gfn")
        return self._batch(gfns, each if len(each) != 1 else _ONE_KIND[int(each[0])], stays=stays)

    def prefault(self, gpa: int, size: int, flags: int = 0) -> tuple[int, int]:
        """Map ``[gpa, gpa + size)`` before the guest asks for it: KVM_PRE_FAULT_MEMORY. Leaves are not accessed yet.

        Parameters
        ----------
        gpa, size : int
            Bytes, multiples of 4096, `size` not 0.
        flags : int
            0.

        Returns
        -------
        tuple of int
            Address and bytes that are left: 0 bytes if all is mapped, more if a later page could not be.

        Raises
        ------
        PrefaultError
            EINVAL: malformed, or a policy without prefault; EOPNOTSUPP: shadow paging, or L2 on tables of L1; ENOENT: the first page is
            in no memslot (its MMIO SPTE is made first, as KVM does); EFAULT: the host does not give it.
        """
        vm = self._vm
        inside = 0 <= gpa < gpa + size <= 1 << vm.platform.gpa_bits
        if not vm.policy.prefault or flags or gpa % 4096 or size % 4096 or not inside:
            raise PrefaultError(f"gpa={gpa:#x}, size={size:#x}, flags={flags}: take page multiples, flags 0, a policy with prefault")
        if vm.platform.paging == SHADOW or self.active is self.guest_mmu:
            raise PrefaultUnsupportedError("shadowed guest tables have no prefault; take a platform with EPT or NPT, and L1")
        self.enter_guest()
        at, end = gpa >> 12, (gpa + size) >> 12
        while at < end:
            args = vm.mmu.tables, vm.memslots.spaces[0], the_host(), self.arrays, self.mode, np.int64(at)
            reason, level = prefault(*args)
            if reason != cx.DONE and at << 12 == gpa:
                if reason == cx.EXIT_NOMEM:
                    raise OutOfTablesError(f"no page-table page left for gfn {at:#x}; delete slots or close the VM")
                if reason == cx.EXIT_MMIO:
                    raise PrefaultHoleError(f"gpa {gpa:#x} is in no memslot; create one first")
                raise PrefaultHostError(f"the host has no memory for gpa {gpa:#x}")
            if reason != cx.DONE:
                break
            at = (at | ((1 << (9 * (level - 1))) - 1)) + 1
        at = min(at, end)
        return at << 12, (end - at) << 12

    @property
    def ring(self) -> npt.NDArray[Any]:
        """View of the dirty ring: structured array of ``flags``, ``slot`` (uint32) and ``offset`` (uint64, pages); empty without one.

        Userspace sets bit 1 of ``flags`` of the entries that it has taken; `VM.reset_dirty_rings` frees those.
        """
        return self.arrays.ring.reshape(-1).view(DIRTY_GFN)

    def _batch(self, gfns: npt.ArrayLike, kinds: Kinds, *, stays: bool = False) -> Exit | None:
        at, batch = 0, self._check(gfns)
        vm, v = self._vm, self.arrays
        stayed = v.reg[cx.STAY] & STAYS
        v.reg[cx.STAY] = (STAYS if stays else 0) | (STAYED if stayed else 0)
        if not stayed or vm.mmu.is_invalid(int(v.reg[cx.ROOT])):
            self.enter_guest()
        run = run_shadow if vm.mmu.has_shadow_pages else run_guest
        while True:
            at = run(vm.mmu.tables, vm.memslots.spaces[0], the_host(), v, self.mode, batch, kinds, at)
            if vm.mmu.log.on:
                vm.mmu.log.collect(self.index, v)
            reason = int(v.reg[cx.EXIT_REASON])
            if reason == cx.DONE:
                return None
            if reason == cx.EXIT_HOST:
                self._copy_page(int(v.reg[cx.EXIT_GFN]))
            elif reason == cx.EXIT_NOMEM:
                raise OutOfTablesError(f"no page-table page left for gfn {v.reg[cx.EXIT_GFN]:#x}; delete slots or close the VM")
            elif reason == cx.EXIT_ROOT:
                vm.mmu.load(self)
            elif reason != cx.EXIT_LOG:
                v.reg[cx.STAY] = 0
                kind = int(kinds[at] if len(kinds) > 1 and at < len(kinds) else kinds[0]) if len(kinds) else cx.READ
                return self.reflect(Exit(_REASONS[reason], int(at), int(v.reg[cx.EXIT_GFN]), kind))

    def _check(self, gfns: npt.ArrayLike) -> I64s:
        array = np.asarray(gfns)
        if array.ndim == 1 and array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TypeError(f"gfns has dtype {array.dtype} and shape {array.shape}; pass a one-dimensional array of integers")
        low, high = int(array.min()), int(array.max())
        bits = PAGED_BITS if self.cr3 is not None or self.in_l2 else self._vm.platform.reach_bits
        if low < 0 or high >> (bits - 12):
            bad = low if low < 0 else high
            raise SlotRangeError(f"gfn {bad:#x} is outside the {bits} bits that the guest can address")
        array = np.ascontiguousarray(array.view(np.int64) if array.dtype == np.uint64 else array, np.int64)
        return array if array.flags.writeable else array.copy()

    def _copy_page(self, gfn: int) -> None:
        """Let the host copy the zero page under `gfn`; its notifier makes KVM let the guest fault again, SPTE or not."""
        if self.arrays.reg[cx.PGD] >= 0:
            gfn = int(self.arrays.guest[cx.GW_GFN])
        slot = self._vm.memslots.at(gfn)
        assert slot is not None
        assert slot.backing is not None
        host_write((slot.hva >> 12) + gfn - slot.base_gfn, slot.backing.users)

    def keep_log(self, on: bool) -> None:
        """Record events of the coming accesses, or stop to."""
        self.arrays = self.arrays._replace(log=np.zeros((LOG_EVENTS if on else 0, LOG_COLUMNS), np.uint64))
        self.arrays.reg[cx.LOGGED] = 0


