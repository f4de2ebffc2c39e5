"""A vCPU's guest tables and its L2: which root it runs on, how L1's tables for L2 change, what L1 gets to see."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spte.arrays import context as cx
from spte.arrays.context import Mode, Vcpu
from spte.bits import (
    GUEST_EPT,
    GUEST_EPT_NO_AD,
    GUEST_LONG,
    PFN_MASK,
    ROLE_AD_DISABLED,
    ROLE_EPT12,
    ROLE_GUEST_MODE,
    ROLE_IS_DIRECT,
    ROLE_LONG,
    ROLE_NPT12,
    WRITABLE,
)
from spte.cpu.run import STAYS
from spte.errors import NestedError, OutOfTablesError, SlotAlignmentError
from spte.exits import Exit
from spte.host.guest_memory import contents
from spte.mmu.walk import is_leaf, walk
from spte.platform import EPT, NPT, SHADOW
from spte.vm.notifier import host_write
from spte.vm.root_cache import RootCache
from spte.vm.shadow_paging import ShadowPaging

if TYPE_CHECKING:
    from spte.vm.vm import VM

PAGED_BITS = 48  # what four levels of guest tables reach
EPTP_WALK_4_WB, EPTP_AD = 0x1E, 0x40  # low bits of an EPT pointer: four levels, write-back; A/D bits on


@dataclass(frozen=True, slots=True)
class L2:
    """What L1 told the CPU of its guest; see `NestedVcpu.enter_l2`."""

    ept: int | None
    ad: bool
    pml: int | None
    vmcb: int | None


class NestedVcpu:
    """The part of a vCPU that chooses its root."""

    _vm: VM
    index: int
    arrays: Vcpu
    mode: Mode

    def __init__(self, vm: VM) -> None:
        self.root_mmu, self.guest_mmu = RootCache(), RootCache()
        self.active, self.role, self.pgd = self.root_mmu, vm.first_role, 0
        self.pae_root = -1
        self.cr3: int | None = None
        self.long_mode = False  # the guest has its paging on
        self.l2: L2 | None = None
        self.ran_l2 = False  # so that vmcs02 has its controls
        self.pml01 = vm.pml_wanted  # the PML control while L1 runs
        self.update_requested = self.update_deferred = self.sync_requested = self.reload_requested = False

    @property
    def in_l2(self) -> bool:
        """The vCPU runs L2."""
        return self.l2 is not None

    @property
    def l1_pml_index(self) -> int:
        """Index of L1's own PML buffer: 511 when empty, counting down, 65535 when full. L1 may set it."""
        return int(self.arrays.reg[cx.L1_PML_INDEX])

    @l1_pml_index.setter
    def l1_pml_index(self, value: int) -> None:
        if not 0 <= value <= 0xFFFF:
            raise NestedError(f"l1_pml_index={value} is not a 16-bit index; an empty buffer has 511")
        self.arrays.reg[cx.L1_PML_INDEX] = value

    def load_cr3(self, gpa: int | None) -> None:
        """Turn the guest's 64-bit paging on with the root table at `gpa`, or off.

        It matters under shadow paging, where KVM shadows those tables; with EPT or NPT the hardware walks them by itself.

        Parameters
        ----------
        gpa : int or None
            Guest-physical address, bytes, of a page that `Backing.table` filled; None: paging off.

        Raises
        ------
        NestedError
            EINVAL: the vCPU runs L2; the address is not of a page, or of one in no memslot where KVM shadows the tables.
        """
        self._vm.alive()
        if self.l2 is not None:
            raise NestedError("the vCPU runs L2; call leave_l2() first")
        _check_page("gpa", gpa)
        if self._vm.platform.paging == SHADOW and gpa is not None:
            self._vm.mmu.check_root(gpa)
        self.end_stay()
        self.long_mode = gpa is not None
        if self._vm.platform.paging == SHADOW:
            mmu = self._vm.mmu
            if self.cr3 is None and self.pae_root >= 0 and isinstance(mmu, ShadowPaging):
                mmu.drop_pages(self.pae_root)
            self.cr3 = gpa
            if gpa is None:
                self._vm.mmu.release(self.root_mmu.drop({root.row for _, root in self.root_mmu}))
                self.role, self.pgd = self._vm.first_role, 0
            else:
                self._switch(self.root_mmu, ROLE_LONG | 4, gpa)

    def enter_l2(self, ept: int | None = None, *, ad: bool = True, pml: int | None = None, vmcb: int | None = None) -> None:
        """Let L1 run its own guest, L2, on this vCPU until `leave_l2` or an exit that L1 sees: VMLAUNCH, VMRESUME, VMRUN.

        Accesses of the vCPU are L2's from then on.

        Parameters
        ----------
        ept : int, optional
            Address of L1's root EPT or NPT table for L2 (bytes, in L1's memory); None: L2's addresses are L1's.
        ad : bool
            L1 turns A/D bits on in its EPT pointer; it can not where the platform has none. NPT always has them.
        pml : int, optional
            Address of the page where L1 wants L2's writes logged (EPT with A/D only); see `l1_pml_index`.
        vmcb : int, optional
            Address of L1's VMCB (AMD), which KVM writes at VMRUN and #VMEXIT.

        Raises
        ------
        NestedError
            EINVAL: the vCPU runs L2 already; an address that is not of a page; `ept` in no memslot, or under shadow paging; there without
            `load_cr3`; `pml` without EPT and its A/D bits; `vmcb` on Intel.
        """
        self._vm.alive()
        paging = self._vm.platform.paging
        has_ad = ad and self._vm.platform.ad_bits
        if self.l2 is not None:
            raise NestedError("the vCPU runs L2 already; call leave_l2() first")
        for name, gpa in (("ept", ept), ("pml", pml), ("vmcb", vmcb)):
            _check_page(name, gpa)
        if paging == SHADOW and (ept is not None or self.cr3 is None):
            raise NestedError("under shadow paging L2 has no EPT or NPT, and L1 its paging on: pass ept=None after load_cr3()")
        if vmcb is not None and paging == EPT:
            raise NestedError(f"vmcb={vmcb:#x} is AMD's; leave it out where L1 has EPT")
        if pml is not None and not (paging == EPT and ept is not None and has_ad):
            raise NestedError(f"pml={pml:#x} needs an EPT of L1 with A/D bits; pass ept=..., ad=True on such a platform")
        if ept is not None:
            self._vm.mmu.check_root(ept)
        log = self._vm.memslots.at(pml >> 12) if pml is not None else None
        if log is not None and pml is not None:
            contents((log.hva >> 12) + (pml >> 12) - log.base_gfn)
        self.end_stay()
        before = self.active, self.role, self.pgd
        self.l2, self.ran_l2 = L2(ept, has_ad, pml, vmcb), True
        self._write_vmcb()
        if ept is None:
            role = (ROLE_LONG | 4 if paging == SHADOW else self._vm.mmu.direct_role) | ROLE_GUEST_MODE
            self._switch(self.root_mmu, role, self.cr3 or 0)
        elif paging == NPT:
            self._switch(self.guest_mmu, ROLE_NPT12 | 4 | ROLE_GUEST_MODE, ept)
        else:
            role = ROLE_EPT12 | 4 | ROLE_GUEST_MODE | (0 if has_ad else ROLE_AD_DISABLED)
            self._switch(self.guest_mmu, role, ept | EPTP_WALK_4_WB | (EPTP_AD if has_ad else 0))
        self.arrays.reg[cx.L1_PML_GFN] = -1 if pml is None else pml >> 12
        try:
            self.enter_guest()
        except OutOfTablesError:
            self.l2, self.arrays.reg[cx.L1_PML_GFN] = None, -1
            self.active, self.role, self.pgd = before
            raise

    def leave_l2(self) -> None:
        """Go back to L1: VMCALL, VMMCALL; NestedError (EINVAL) if the vCPU does not run L2."""
        if self.l2 is None:
            raise NestedError("the vCPU does not run L2; call enter_l2() first")
        self.end_stay()
        self._write_vmcb()
        self.l2 = None
        self.arrays.reg[cx.L1_PML_GFN] = -1
        if self.update_deferred:
            self.update_deferred = False
            self.pml01 = self._vm.pml_wanted
        role = ROLE_LONG | 4 if self.cr3 is not None else self._vm.first_role
        self._switch(self.root_mmu, role, self.cr3 or 0)

    def invept(self, ept: int | None = None) -> None:
        """Let L1 flush what its EPT translates: INVEPT. KVM frees its roots for it and finds the guest's changes at the next entry.

        Parameters
        ----------
        ept : int, optional
            Address of the root table (single context); None: all of them (global).
        """
        self.end_stay()
        rows = {root.row for _, root in self.guest_mmu if ept is None or root.pgd >> 12 == ept >> 12}
        self._vm.mmu.release(self.guest_mmu.drop(rows))

    def end_stay(self) -> None:
        """Leave the guest that an access with `stays` has not left: what comes next is an exit, which drains its PML buffer."""
        if self.arrays.reg[cx.STAY] & STAYS:
            self._batch([], np.array([cx.READ], np.uint8))

    def _switch(self, cache: RootCache, role: int, pgd: int) -> None:
        """Make `cache` the active one and find the root for `role` and `pgd` in it; AMD and shadow paging sync it at the entry."""
        self.active, self.role, self.pgd = cache, role, pgd
        self._vm.mmu.release(cache.switch(role, pgd, direct=bool(role & ROLE_IS_DIRECT)))
        self.sync_requested = self._vm.platform.paging != EPT

    def _write_vmcb(self) -> None:
        if self.l2 is not None and self.l2.vmcb is not None:
            self._vm.kernel_write(self.l2.vmcb >> 12, self.index)

    def enter_guest(self) -> None:
        """Before the vCPU enters the guest: take over the PML control, load a valid root. While it runs L2, a new control waits for L1."""
        self._vm.alive()
        if self.update_requested:
            self.update_requested = False
            self.update_deferred |= self.in_l2
            if not self.in_l2:
                self.pml01 = self._vm.pml_wanted
        self._take_mode()
        self._vm.mmu.load(self)
        if self.sync_requested:
            self.sync_requested = False
            self._vm.mmu.sync(self)

    def _take_mode(self) -> None:
        """Bring what kernels know of the vCPU in step with what it runs."""
        base, l2 = self._vm.mmu.mode, self.l2
        if l2 is None:
            self.mode = base
        elif self._vm.platform.paging == EPT:
            gpte = GUEST_EPT if l2.ad else GUEST_EPT_NO_AD
            # Without L1's EPT, KVM turns A/D bits off for L2 on a root whose entries say that they are on.
            self.mode = base._replace(hw_ad=np.int64(l2.ept is not None and l2.ad), gpte=gpte)
        else:
            self.mode = base._replace(gpte=GUEST_LONG)
        pml_in_l2 = self._vm.policy.pml_in_l2
        self.arrays.reg[cx.PML_ON] = self.pml01 and (l2 is None or pml_in_l2)
        self.arrays.reg[cx.PML_BARRED] = l2 is not None and not pml_in_l2

    def reflect(self, stop: Exit) -> Exit:
        """Turn a fault that L1's tables or its PML buffer cause into the exit that L1 sees."""
        if stop.reason == "page_fault":
            stop = dataclasses.replace(stop, allows=int(self.arrays.guest[cx.GW_ACCESS]))
        if self.l2 is None or self.l2.ept is None or stop.reason not in ("page_fault", "pml_full"):
            return stop
        self.leave_l2()
        if stop.reason == "page_fault":
            stop = dataclasses.replace(stop, reason="ept_violation" if self._vm.platform.paging == EPT else "npf")
        return stop

    def _batch(self, gfns: list[int], kinds: np.ndarray[tuple[int], np.dtype[np.uint8]], *, stays: bool = False) -> Exit | None:
        raise NotImplementedError

    def store(self, gpa: int, value: int, *, stays: bool = False) -> Exit | None:
        """Write 8 bytes of guest memory: how a guest changes page tables that KVM shadows. One access, as `write` does it.

        Parameters
        ----------
        gpa : int
            Address that the running guest gives, bytes, a multiple of 8.
        value : int
            64 bits, unsigned.
        stays : bool
            The guest is not left after it: what follows is part of the same stay.

        Returns
        -------
        Exit or None
            None if it was done.

        Raises
        ------
        SlotAlignmentError
            EINVAL: `gpa` is not a multiple of 8, or `value` has more than 64 bits; errors as `read` else.
        """
        if gpa % 8 or not 0 <= value < 1 << 64:
            raise SlotAlignmentError(f"store of {value:#x} at {gpa:#x}: take a multiple of 8 and 64 bits")
        reg = self.arrays.reg
        reg[cx.STORE] = gpa & 0xFFF
        try:
            stop = self._batch([gpa >> 12], np.array([cx.WRITE], np.uint8), stays=stays)
        finally:
            reg[cx.STORE] = 0
        if stop is None:
            contents(self._host_page(gpa >> 12))[(gpa & 0xFFF) // 8] = value
        return stop

    def _host_page(self, gfn: int) -> int:
        """Return the host page of a page that the guest has just written."""
        t, reg = self._vm.mmu.tables, self.arrays.reg
        row, i, level = walk(t, reg[cx.ROOT], np.int64(gfn))
        spte = t.sptes[row, i]
        if is_leaf(spte, level) and spte & WRITABLE:
            return (int(spte & PFN_MASK) >> 12) + (gfn & ((1 << (9 * (int(level) - 1))) - 1))
        gfn = gfn if reg[cx.PGD] < 0 else int(self.arrays.guest[cx.GW_GFN])  # KVM did the write itself
        slot = self._vm.memslots.at(gfn)
        assert slot is not None
        assert slot.backing is not None
        hpage = (slot.hva >> 12) + gfn - slot.base_gfn
        host_write(hpage, slot.backing.users)
        return hpage


def _check_page(name: str, gpa: int | None) -> None:
    if gpa is not None and (gpa % 4096 or not 0 <= gpa < 1 << PAGED_BITS):
        raise NestedError(f"{name}={gpa:#x} is not the address of a page below {PAGED_BITS} bits; round down to {gpa & ~0xFFF:#x}")
