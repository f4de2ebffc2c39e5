"""A vCPU's guest tables and its L2: which root it runs on, how L1's tables for L2 change, what L1 gets to see."""

from __future__ import annotations

import dataclasses

from spte.access import Access
from spte.bits import ROLE_AD_DISABLED, ROLE_EPT12, ROLE_GUEST_MODE, ROLE_LONG, ROLE_NPT12
from spte.errors import NestedError, OutOfTablesError
from spte.exits import Exit
from spte.host.guest_memory import contents
from spte.platform import EPT, NPT, SHADOW
from spte.vm.kvm import L2, Kvm, KvmVcpu
from spte.vm.root_cache import RootCache
from spte.vm.vcpu_run import PAGED_BITS, enter_guest, kick, leave_guest

EPTP_WALK_4_WB, EPTP_AD = 0x1E, 0x40  # low bits of an EPT pointer: four levels, write-back; A/D bits on


def load_cr3(kvm: Kvm, vcpu: KvmVcpu, gpa: int | None) -> None:
    """Turn the guest's paging on with the root table at `gpa`, or off; see `VirtualCpu.load_cr3`."""
    kvm.check_alive()
    if vcpu.in_l2:
        raise NestedError("the vCPU runs L2; call leave_l2() first")
    _check_page("gpa", gpa)
    if kvm.platform.paging == SHADOW and gpa is not None:
        kvm.mmu.check_root(gpa)
    leave_guest(kvm, vcpu)
    if kvm.platform.paging != SHADOW:
        return
    mmu = vcpu.mmu
    if vcpu.cr3 is None:
        kvm.mmu.drop_pae_pages(mmu)
    vcpu.cr3 = gpa
    if gpa is None:
        kvm.mmu.release(mmu.drop(mmu.root_mmu, {root.row for _, root in mmu.root_mmu}))
        mmu.role, mmu.pgd = kvm.mmu.first_role, 0
    else:
        _switch(kvm, vcpu, mmu.root_mmu, ROLE_LONG | 4, gpa)


def enter_l2(kvm: Kvm, vcpu: KvmVcpu, ept: int | None, pml: int | None, vmcb: int | None, *, ad: bool) -> None:
    """Run L2 from now on; see `VirtualCpu.enter_l2`: nested_vmx_run, nested_svm_vmrun."""
    kvm.check_alive()
    paging, mmu, reg = kvm.platform.paging, vcpu.mmu, vcpu.arrays.vcpu[0]
    has_ad = ad and kvm.platform.ad_bits
    if vcpu.in_l2:
        raise NestedError("the vCPU runs L2 already; call leave_l2() first")
    for name, gpa in (("ept", ept), ("pml", pml), ("vmcb", vmcb)):
        _check_page(name, gpa)
    if paging == SHADOW and (ept is not None or vcpu.cr3 is None):
        raise NestedError("under shadow paging L2 has no EPT or NPT, and L1 its paging on: pass ept=None after load_cr3()")
    if vmcb is not None and paging == EPT:
        raise NestedError(f"vmcb={vmcb:#x} is AMD's; leave it out where L1 has EPT")
    if pml is not None and not (paging == EPT and ept is not None and has_ad):
        raise NestedError(f"pml={pml:#x} needs an EPT of L1 with A/D bits; pass ept=..., ad=True on such a platform")
    if ept is not None:
        kvm.mmu.check_root(ept)
    log = kvm.memslots.at(pml >> 12) if pml is not None else None
    if log is not None and pml is not None:
        contents(log.hpage_of(pml >> 12))
    leave_guest(kvm, vcpu)
    before = mmu.active, mmu.role, mmu.pgd
    vcpu.nested.l2 = L2(ept, has_ad, pml, vmcb)
    _write_vmcb(kvm, vcpu)
    if ept is None:
        role = (ROLE_LONG | 4 if paging == SHADOW else kvm.mmu.direct_role) | ROLE_GUEST_MODE
        _switch(kvm, vcpu, mmu.root_mmu, role, vcpu.cr3 or 0)
    elif paging == NPT:
        _switch(kvm, vcpu, mmu.guest_mmu, ROLE_NPT12 | 4 | ROLE_GUEST_MODE, ept)
    else:
        role = ROLE_EPT12 | 4 | ROLE_GUEST_MODE | (0 if has_ad else ROLE_AD_DISABLED)
        _switch(kvm, vcpu, mmu.guest_mmu, role, ept | EPTP_WALK_4_WB | (EPTP_AD if has_ad else 0))
    reg.l1_pml_gfn = -1 if pml is None else pml >> 12
    try:
        enter_guest(kvm, vcpu)
    except OutOfTablesError:
        vcpu.nested.l2, reg.l1_pml_gfn = None, -1
        mmu.active, mmu.role, mmu.pgd = before
        raise


<<<<<<< f72c9dbc1784c216e756c4aa38cac6e8a1ec11cc
def leave_l2(kvm: Kvm, vcpu: KvmVcpu) -> None:
    """Go back to L1: nested_vmx_vmexit, nested_svm_vmexit."""
    if not vcpu.in_l2:
        raise NestedError("the vCPU does not run L2; call enter_l2() first")
    leave_guest(kvm, vcpu)
    _write_vmcb(kvm, vcpu)
    vcpu.nested.l2 = None
    vcpu.arrays.vcpu[0].l1_pml_gfn = -1
    if vcpu.nested.update_deferred:
        vcpu.nested.update_deferred = False
        vcpu.pml01 = kvm.pml_wanted
    role = ROLE_LONG | 4 if vcpu.cr3 is not None else kvm.mmu.first_role
    _switch(kvm, vcpu, vcpu.mmu.root_mmu, role, vcpu.cr3 or 0)
=======
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
>>>>>>> 9da19d85d5939b403bf8a236c475c63f4abda36e


def invept(kvm: Kvm, vcpu: KvmVcpu, ept: int | None) -> None:
    """Flush what L1's EPT at `ept`, or any, translates: handle_invept. KVM frees its roots for it."""
    leave_guest(kvm, vcpu)
    cache = vcpu.mmu.guest_mmu
    rows = {root.row for _, root in cache if ept is None or root.pgd >> 12 == ept >> 12}
    kvm.mmu.release(vcpu.mmu.drop(cache, rows))


<<<<<<< f72c9dbc1784c216e756c4aa38cac6e8a1ec11cc
def reflect(kvm: Kvm, vcpu: KvmVcpu, stop: Exit) -> Exit:
    """Turn a fault that L1's tables or its PML buffer cause into the exit that L1 sees: nested_ept_inject_page_fault."""
    if stop.reason == "page_fault":
        stop = dataclasses.replace(stop, allows=_access_of(int(vcpu.arrays.vcpu[0].walker.pte_access)))
    l2 = vcpu.nested.l2
    if l2 is None or l2.ept is None or stop.reason not in ("page_fault", "pml_full"):
=======
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
        self.arrays.vcpu[0].l1_pml_gfn = -1 if pml is None else pml >> 12
        try:
            self.enter_guest()
        except OutOfTablesError:
            self.l2, self.arrays.vcpu[0].l1_pml_gfn = None, -1
            self.active, self.role, self.pgd = before
            raise

    def leave_l2(self) -> None:
        """Go back to L1: VMCALL, VMMCALL; NestedError (EINVAL) if the vCPU does not run L2."""
        if self.l2 is None:
            raise NestedError("the vCPU does not run L2; call enter_l2() first")
        self.end_stay()
        self._write_vmcb()
        self.l2 = None
        self.arrays.vcpu[0].l1_pml_gfn = -1
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
        if self.arrays.vcpu[0].stay & STAYS:
            self._batch([], np.array([READ], np.uint8))

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
            self.mode = replace(base, hw_ad=np.int64(l2.ept is not None and l2.ad), gpte=gpte)
        else:
            self.mode = replace(base, gpte=GUEST_LONG)
        pml_in_l2 = self._vm.policy.pml_in_l2
        self.arrays.vcpu[0].pml_enabled = self.pml01 and (l2 is None or pml_in_l2)
        self.arrays.vcpu[0].pml_barred = l2 is not None and not pml_in_l2

    def reflect(self, stop: Exit) -> Exit:
        """Turn a fault that L1's tables or its PML buffer cause into the exit that L1 sees."""
        if stop.reason == "page_fault":
            stop = dataclasses.replace(stop, allows=int(self.arrays.vcpu[0].walker.pte_access))
        if self.l2 is None or self.l2.ept is None or stop.reason not in ("page_fault", "pml_full"):
            return stop
        self.leave_l2()
        if stop.reason == "page_fault":
            stop = dataclasses.replace(stop, reason="ept_violation" if self._vm.platform.paging == EPT else "npf")
>>>>>>> 9da19d85d5939b403bf8a236c475c63f4abda36e
        return stop
    leave_l2(kvm, vcpu)
    if stop.reason == "page_fault":
        stop = dataclasses.replace(stop, reason="ept_violation" if kvm.platform.paging == EPT else "npf")
    return stop


def _switch(kvm: Kvm, vcpu: KvmVcpu, cache: RootCache, role: int, pgd: int) -> None:
    """Run on the root for `role` and `pgd` of `cache`: kvm_mmu_new_pgd. AMD and shadow paging sync it at the entry."""
    kvm.mmu.release(vcpu.mmu.switch(cache, role, pgd))
    vcpu.sync_requested = kvm.platform.paging != EPT


def _write_vmcb(kvm: Kvm, vcpu: KvmVcpu) -> None:
    l2 = vcpu.nested.l2
    if l2 is not None and l2.vmcb is not None:
        kick(kvm)
        kvm.write_guest_page(l2.vmcb >> 12, vcpu.index)


def _access_of(acc: int) -> Access:
    """Return what KVM's ACC_EXEC_MASK (1), ACC_WRITE_MASK (2) and ACC_USER_MASK (4, here: may be read) allow."""
    return Access((acc >> 2 & 1) | acc & 2 | (acc & 1) << 2)


def _check_page(name: str, gpa: int | None) -> None:
    if gpa is not None and (gpa % 4096 or not 0 <= gpa < 1 << PAGED_BITS):
        raise NestedError(f"{name}={gpa:#x} is not the address of a page below {PAGED_BITS} bits; round down to {gpa & ~0xFFF:#x}")
