"""Capabilities and module parameters of the VM: numbers, arguments, what KVM_CHECK_EXTENSION says."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from spte._arguments import index, instance, integer, spell
from spte.errors import CapabilityError, RingTooLargeError, VcpuExistsError
from spte.platform import PAGE_SIZE, SHADOW, Platform, named
from spte.policy import Policy
from spte.vm.kvm import Kvm
from spte.vm.memslots import ADDRESS_SPACES

NR_MEMSLOTS, MAX_VCPUS, ADDRESS_SPACE_COUNT, MAX_VCPU_ID = 10, 66, 118, 128
MANUAL_PROTECT, DIRTY_RING, DIRTY_RING_ACQ_REL, PREFAULT = 168, 192, 223, 236
RING_ENTRY_BYTES, RING_MAX_BYTES = 16, 65536 * 16
RING_RESERVED = 64
RING_SIZE_BITS = 32  # KVM takes the ring's size as a u32
_ENABLED = {"manual_dirty_log_protect2": MANUAL_PROTECT, "dirty_log_ring": DIRTY_RING, "dirty_log_ring_acq_rel": DIRTY_RING_ACQ_REL}
_NAMES = {
    **_ENABLED, "nr_memslots": NR_MEMSLOTS, "max_vcpus": MAX_VCPUS, "multi_address_space": ADDRESS_SPACE_COUNT,
    "max_vcpu_id": MAX_VCPU_ID, "pre_fault_memory": PREFAULT,
}  # fmt: skip


def _number_of(name: str | int) -> int:
    """Return the number of a capability, 0 for a name that is not known; TypeError for what is neither."""
    return _NAMES.get(name.lower().removeprefix("kvm_cap_"), 0) if isinstance(name, str) else index(name, "cap")


def enabled_number(name: str | int) -> int:
    """Return the number of a capability that can be enabled; CapabilityError (EINVAL) lists those."""
    found = _number_of(name)
    if found not in _ENABLED.values():
        known = ", ".join(f"{key} ({value})" for key, value in _ENABLED.items())
        raise CapabilityError(f"capability {spell(name)} can not be enabled; take one of {known}")
    return found


def check_extension(kvm: Kvm, cap: str | int) -> int:
    """Return what KVM_CHECK_EXTENSION says of a capability given by name or number: 0 = unknown."""
    policy = kvm.policy
    known = {
        NR_MEMSLOTS: policy.user_mem_slots, MAX_VCPUS: policy.max_vcpus, ADDRESS_SPACE_COUNT: ADDRESS_SPACES,
        MAX_VCPU_ID: policy.max_vcpu_ids, MANUAL_PROTECT: 3, DIRTY_RING: RING_MAX_BYTES * policy.dirty_ring,
        DIRTY_RING_ACQ_REL: RING_MAX_BYTES * policy.dirty_ring_acq_rel,
        PREFAULT: int(policy.prefault and kvm.platform.paging != SHADOW),
    }  # fmt: skip
    return known.get(_number_of(cap), 0)


def manual_protect(arg0: int) -> int:
    """Return the argument of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 if it is 0, 1 (enable) or 3 (and initially-set)."""
    if index(arg0, "manual") not in (0, 1, 3):
        raise CapabilityError(f"manual={spell(arg0)} is not 0 (off), 1 (ENABLE) or 3 (ENABLE | INITIALLY_SET)")
    return index(arg0, "manual")


def dirty_ring(arg0: int, cpu_dirty_log_size: int, policy: Policy) -> int:
    """Return the bytes of a ring as KVM takes them from a 64-bit argument; CapabilityError if it refuses them."""
    if not policy.dirty_ring:
        raise CapabilityError(f"policy {policy.name} has no dirty rings; log to bitmaps, or take a newer policy")
    size = arg0 & ((1 << RING_SIZE_BITS) - 1)
    given = f"ring of {arg0} bytes" + (f", of which {RING_SIZE_BITS} bits count, {size}," if size != arg0 else "")
    least = 1 << (max(RING_ENTRY_BYTES * (RING_RESERVED + cpu_dirty_log_size), PAGE_SIZE) - 1).bit_length()
    if not size or size & (size - 1):
        near = min(max(1 << size.bit_length(), least), RING_MAX_BYTES)
        raise CapabilityError(f"{given} is not a power of two; take {near}")
    if size < least:
        raise CapabilityError(f"{given} is too small; take at least {least}")
    if size > RING_MAX_BYTES:
        raise RingTooLargeError(f"{given} is too large; take at most {RING_MAX_BYTES}")
    return size


def arguments(
    platform: str | Platform, policy: str | Policy, *, vcpus: int, manual: int, ring_bytes: int
) -> tuple[Platform, Policy, int, int, int]:
    """Return the arguments of a new VM, in this order, as KVM takes them: no names, and of a ring's size what counts.

    TypeError or KvmError if it refuses one; see `VM`.
    """
    platform = named(platform) if isinstance(platform, str) else instance(platform, "platform", Platform, "a name or a Platform")
    policy = Policy.named(policy) if isinstance(policy, str) else instance(policy, "policy", Policy, "a name or a Policy")
    vcpus = integer(vcpus, "vcpus", CapabilityError, 0, policy.max_vcpus + 1)
    manual = manual_protect(manual)
    ring_bytes = integer(ring_bytes, "ring_bytes", CapabilityError)
    return platform, policy, vcpus, manual, dirty_ring(ring_bytes, platform.cpu_dirty_log_size, policy) if ring_bytes else 0


def enable_cap(kvm: Kvm, cap: int, arg0: int) -> None:
    """Enable a capability of the VM by number; see `VM.enable_cap`: KVM_ENABLE_CAP."""
    if cap == MANUAL_PROTECT:
        kvm.change(manual=manual_protect(arg0))
        if arg0 != 3:
            kvm.memslots.leave_initially_set()
        return
    if cap == DIRTY_RING_ACQ_REL and kvm.policy.dirty_ring and not kvm.policy.dirty_ring_acq_rel:
        raise CapabilityError(f"policy {kvm.policy.name} has no dirty_log_ring_acq_rel; take dirty_log_ring (192)")
    size = dirty_ring(arg0, kvm.platform.cpu_dirty_log_size, kvm.policy)
    if kvm.ring_entries:
        raise CapabilityError(f"the VM has rings of {kvm.ring_entries * RING_ENTRY_BYTES} bytes already; a size is given once")
    if kvm.vcpus:
        raise CapabilityError(f"ring of {size} bytes comes too late: vCPUs exist; make the VM with vcpus=0, or pass ring_bytes={size}")
    kvm.ring_entries = size // RING_ENTRY_BYTES
    kvm.memslots.free_bitmaps()


def new_vcpu_id(policy: Policy, taken: Collection[int], wanted: int | None) -> int:
    """Return the id of a vCPU that is made beside those with ids `taken`: `wanted`, or the first that is free; checks in KVM's order."""
    if wanted is not None:
        wanted = integer(wanted, "vcpu_id", CapabilityError, 0, policy.max_vcpu_ids)
    if len(taken) >= policy.max_vcpus:
        raise CapabilityError(f"the VM has {len(taken)} vCPUs, as many as policy {policy.name} allows")
    if wanted in taken:
        raise VcpuExistsError(f"vcpu_id={wanted} is another vCPU's; leave it out, and a free one is taken")
    return wanted if wanted is not None else next(i for i in range(len(taken) + 1) if i not in taken)


def set_param(kvm: Kvm, name: str, value: bool) -> None:
    """Set a module parameter; see `VM.set_param`."""
    if getattr(kvm.policy, name) != value:
        kvm.change(policy=dataclasses.replace(kvm.policy, **{name: value}))  # type: ignore[arg-type]
        if name == "nx_huge_pages":
            kvm.mmu.zap_all()
