"""Memory mapped before the guest asks for it: KVM_PRE_FAULT_MEMORY."""

from __future__ import annotations

import numpy as np

from spte.arrays.vcpu import DONE, EXIT_MMIO, EXIT_NOMEM
from spte.cpu.prefault import prefault
from spte.errors import OutOfTablesError, PrefaultError, PrefaultHoleError, PrefaultHostError, PrefaultUnsupportedError
from spte.host.pages import the_host
from spte.platform import SHADOW
from spte.vm.kvm import Kvm, KvmVcpu
from spte.vm.vcpu_run import enter_guest


def pre_fault_memory(kvm: Kvm, vcpu: KvmVcpu, gpa: int, size: int, flags: int) -> tuple[int, int]:
    """Map ``[gpa, gpa + size)`` before the guest asks for it; see `VirtualCpu.prefault`: kvm_vcpu_pre_fault_memory."""
    if not kvm.policy.prefault or flags or gpa % 4096 or size % 4096 or not 0 <= gpa < gpa + size < 1 << 64:
        raise PrefaultError(f"gpa={gpa:#x}, size={size:#x}, flags={flags:#x}: take page multiples, flags 0, a policy with prefault")
    if kvm.platform.paging == SHADOW or vcpu.mmu.active is vcpu.mmu.guest_mmu:
        raise PrefaultUnsupportedError("shadowed guest tables have no prefault; take a platform with EPT or NPT, and L1")
    enter_guest(kvm, vcpu)
    at, end = gpa >> 12, (gpa + size) >> 12
    while at < end:
        reason, level = EXIT_MMIO, 1  # beyond what a guest can address is a hole without an SPTE
        if at < 1 << (kvm.platform.gpa_bits - 12):
            args = kvm.mmu.tables, kvm.memslots.spaces[vcpu.as_id], the_host(), vcpu.arrays, vcpu.mmu.mode, np.int64(at)
            reason, level = prefault(*args)
        if reason != DONE and at << 12 == gpa:
            if reason == EXIT_NOMEM:
                raise OutOfTablesError(f"no page-table page left for gfn {at:#x}; delete slots or close the VM")
            if reason == EXIT_MMIO:
                raise PrefaultHoleError(f"gpa {gpa:#x} is in no memslot; create one first")
            raise PrefaultHostError(f"the host has no memory for gpa {gpa:#x}")
        if reason != DONE:
            break
        at = (at | ((1 << (9 * (int(level) - 1))) - 1)) + 1
        if kvm.exclusive.contended:
            kvm.exclusive.let_in()
            enter_guest(kvm, vcpu)
    at = min(at, end)
    return at << 12, (end - at) << 12
