"""A vCPU's guest tables and its L2: which root it runs on, how L1's tables for L2 change, what L1 gets to see."""

from __future__ import annotations

import dataclasses

from spte.access import Access
from spte.bits import ROLE_AD_DISABLED, ROLE_EPT12, ROLE_GUEST_MODE, ROLE_LONG, ROLE_NPT12
from spte.errors import NestedError, OutOfTablesError
from spte.exits import Exit
from spte.host.guest_memory import contents
from spte.platform import EPT, NPT, SHADOW
from spte.vm.kvm import Kvm, KvmVcpu
from spte.vm.modes.state import L2
from spte.vm.root_cache import RootCache
from spte.vm.vcpu_run import PAGED_BITS, enter_guest, kick, leave_guest

EPTP_WALK_4_WB, EPTP_AD = 0x1E, 0x40  # low bits of an EPT pointer: four levels, write-back; A/D bits on


def load_cr3(kvm: Kvm, vcpu: KvmVcpu, gpa: int | None) -> None:
    """Turn the guest's paging on with the root table at `gpa`, or off; see `VirtualCpu.load_cr3`."""
    kvm.check_alive()
    if vcpu.in_l2:
        raise NestedError("the vCPU runs L2; call leave_l2() first")
    _refuse_smm(vcpu)
    _check_page("gpa", gpa)
    if kvm.platform.paging == SHADOW and gpa is not None:
        kvm.mmu.check_root(gpa)
    leave_guest(kvm, vcpu)
    vcpu.long_mode = gpa is not None
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
    _refuse_smm(vcpu)
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
    vcpu.nested.l2, vcpu.nested.ran = L2(ept, has_ad, pml, vmcb), True
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


def invept(kvm: Kvm, vcpu: KvmVcpu, ept: int | None) -> None:
    """Flush what L1's EPT at `ept`, or any, translates: handle_invept. KVM frees its roots for it."""
    leave_guest(kvm, vcpu)
    cache = vcpu.mmu.guest_mmu
    rows = {root.row for _, root in cache if ept is None or root.pgd >> 12 == ept >> 12}
    kvm.mmu.release(vcpu.mmu.drop(cache, rows))


def reflect(kvm: Kvm, vcpu: KvmVcpu, stop: Exit) -> Exit:
    """Turn a fault that L1's tables or its PML buffer cause into the exit that L1 sees: nested_ept_inject_page_fault."""
    if stop.reason == "page_fault":
        stop = dataclasses.replace(stop, allows=_access_of(int(vcpu.arrays.vcpu[0].walker.pte_access)))
    l2 = vcpu.nested.l2
    if l2 is None or l2.ept is None or stop.reason not in ("page_fault", "pml_full"):
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


def _refuse_smm(vcpu: KvmVcpu) -> None:
    if vcpu.smm is not None:
        raise NestedError("in system management mode the guest has its paging off and no L2; call leave_smm() first")


def _check_page(name: str, gpa: int | None) -> None:
    if gpa is not None and (gpa % 4096 or not 0 <= gpa < 1 << PAGED_BITS):
        raise NestedError(f"{name}={gpa:#x} is not the address of a page below {PAGED_BITS} bits; round down to {gpa & ~0xFFF:#x}")
