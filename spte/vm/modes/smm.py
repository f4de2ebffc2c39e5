"""System management mode: a vCPU runs on the memslots of address space 1, and goes back."""

from __future__ import annotations

from spte.bits import ROLE_LONG, ROLE_SMM_SHIFT
from spte.errors import SmmError
from spte.vm.kvm import Kvm, KvmVcpu
from spte.vm.modes.state import Interrupted
from spte.vm.vcpu_run import enter_guest, leave_guest

STATE_PAGE = 0xF000  # of SMRAM: the page whose last 512 bytes take the state


def enter_smm(kvm: Kvm, vcpu: KvmVcpu, smbase: int) -> None:
    """Take an SMI; see `VirtualCpu.enter_smm`: enter_smm."""
    kvm.check_alive()
    if vcpu.smm is not None:
        raise SmmError("the vCPU is in system management mode already; call leave_smm() first")
    if vcpu.in_l2:
        raise SmmError("the vCPU runs L2, and KVM takes an SMI in L1; call leave_l2() first")
    if smbase % 4096:
        raise SmmError(f"smbase={smbase:#x} is not a multiple of 4096; round down to {smbase & ~0xFFF:#x}")
    leave_guest(kvm, vcpu)
    vcpu.smm = Interrupted(vcpu.cr3, vcpu.long_mode)
    if not kvm.write_guest_page((smbase + STATE_PAGE) >> 12, vcpu.index):
        vcpu.smm = None
        raise SmmError(
            f"no writable slot of address space 1 has gpa {smbase + STATE_PAGE:#x}, where KVM saves the state; "
            "create one with slot=0x10000 or above"
        )
    vcpu.cr3, vcpu.long_mode = None, False
    kvm.mmu.reset_context(vcpu.mmu, kvm.mmu.first_role | 1 << ROLE_SMM_SHIFT)
    enter_guest(kvm, vcpu)


def leave_smm(kvm: Kvm, vcpu: KvmVcpu) -> None:
    """Go back to where the SMI came; see `VirtualCpu.leave_smm`: emulator_leave_smm."""
    kvm.check_alive()
    if vcpu.smm is None:
        raise SmmError("the vCPU is not in system management mode; call enter_smm() first")
    leave_guest(kvm, vcpu)
    vcpu.cr3, vcpu.long_mode = vcpu.smm
    vcpu.smm = None
    kvm.mmu.reset_context(vcpu.mmu, kvm.mmu.first_role if vcpu.cr3 is None else ROLE_LONG | 4)
    vcpu.mmu.pgd = vcpu.cr3 or 0
    enter_guest(kvm, vcpu)
