"""Capabilities and module parameters of the VM: numbers, arguments, what KVM_CHECK_EXTENSION says."""

from __future__ import annotations

import dataclasses

from spte.errors import CapabilityError, RingTooLargeError
from spte.platform import PAGE_SIZE, SHADOW
from spte.vm.kvm import Kvm
from spte.vm.memslots import ADDRESS_SPACES, USER_MEM_SLOTS

MANUAL_PROTECT, DIRTY_RING, DIRTY_RING_ACQ_REL, PREFAULT = 168, 192, 223, 236
RING_ENTRY_BYTES, RING_MAX_BYTES = 16, 65536 * 16
RING_RESERVED = 64
_NAMES = {"manual_dirty_log_protect2": MANUAL_PROTECT, "dirty_log_ring": DIRTY_RING, "dirty_log_ring_acq_rel": DIRTY_RING_ACQ_REL}
_EXTENSIONS = {
    10: USER_MEM_SLOTS, 118: ADDRESS_SPACES, MANUAL_PROTECT: 3, DIRTY_RING: RING_MAX_BYTES, DIRTY_RING_ACQ_REL: RING_MAX_BYTES, PREFAULT: 1,
}  # fmt: skip


def _number_of(name: str | int) -> int | None:
    return _NAMES.get(name.lower().removeprefix("kvm_cap_")) if isinstance(name, str) else name


def _enabled_number(name: str | int) -> int:
    """Return the number of a capability that can be enabled; CapabilityError (EINVAL) lists those."""
    found = _number_of(name)
    if found not in _NAMES.values():
        known = ", ".join(f"{key} ({value})" for key, value in _NAMES.items())
        raise CapabilityError(f"capability {name!r} can not be enabled; take one of {known}")
    assert found is not None
    return found


def check_extension(kvm: Kvm, cap: str | int) -> int:
    """Return what KVM_CHECK_EXTENSION says of a capability given by name or number: 0 = unknown."""
    prefault = kvm.policy.prefault and kvm.platform.paging != SHADOW
    return _EXTENSIONS.get(_number_of(cap) or 0, 0) if prefault or cap != PREFAULT else 0


def check_manual_protect(arg0: int) -> None:
    """Refuse arguments of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 other than 0, 1 (enable) and 3 (and initially-set)."""
    if arg0 not in (0, 1, 3):
        raise CapabilityError(f"manual={arg0} is not 0 (off), 1 (ENABLE) or 3 (ENABLE | INITIALLY_SET)")


def check_dirty_ring(size: int, cpu_dirty_log_size: int) -> None:
    """Refuse ring sizes, in bytes, that KVM refuses."""
    least = RING_ENTRY_BYTES * (RING_RESERVED + cpu_dirty_log_size)
    if size <= 0 or size & (size - 1):
        raise CapabilityError(f"ring of {size} bytes is not a power of two; take {1 << max(size, PAGE_SIZE - 1).bit_length()}")
    if size < max(least, PAGE_SIZE):
        raise CapabilityError(f"ring of {size} bytes is too small; take at least {1 << (max(least, PAGE_SIZE) - 1).bit_length()}")
    if size > RING_MAX_BYTES:
        raise RingTooLargeError(f"ring of {size} bytes is too large; take at most {RING_MAX_BYTES}")


def enable_cap(kvm: Kvm, name: str | int, arg0: int) -> None:
    """Enable a capability of the VM; see `VM.enable_cap`: KVM_ENABLE_CAP."""
    if _enabled_number(name) == MANUAL_PROTECT:
        check_manual_protect(arg0)
        kvm.change(manual=arg0)
        if arg0 != 3:
            kvm.memslots.leave_initially_set()
        return
    check_dirty_ring(arg0, kvm.platform.cpu_dirty_log_size)
    raise CapabilityError(f"ring of {arg0} bytes comes too late: vCPUs exist; pass ring_bytes={arg0} when making the VM")


def set_param(kvm: Kvm, name: str, value: bool) -> None:
    """Set a module parameter; see `VM.set_param`."""
    if getattr(kvm.policy, name) != value:
        kvm.change(policy=dataclasses.replace(kvm.policy, **{name: value}))  # type: ignore[arg-type]
        if name == "nx_huge_pages":
            kvm.mmu.zap_all()
