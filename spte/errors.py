"""Errors of the VM interface: one subclass of `KvmError` per broken contract, each with the errno of the real ioctl."""

from __future__ import annotations

import errno as _errno


class KvmError(OSError):
    """A KVM call that fails. ``errno`` is what the ioctl gives; the text holds the values at fault and the way out."""

    code: int = _errno.EINVAL

    def __init__(self, message: str) -> None:
        super().__init__(self.code, message)

    @property
    def errno_name(self) -> str:
        """The errno as KVM's sources spell it: ``EINVAL``, ``EOPNOTSUPP``, ..."""
        return "EOPNOTSUPP" if self.code == _errno.EOPNOTSUPP else _errno.errorcode[self.code]

    def __str__(self) -> str:
        return f"{self.errno_name}: {self.strerror}"


class ArgumentError(KvmError):
    """A number that no call takes: it has more than 64 bits, or there is no such vCPU or page."""


class SlotIdError(KvmError):
    """A slot id or address space outside what the VM has."""


class SlotFlagsError(KvmError):
    """Flags that a memslot can not have."""


class SlotAlignmentError(KvmError):
    """Size, guest address or host address is not page aligned, or no address at all."""


class SlotRangeError(KvmError):
    """A slot that wraps, is too large, or lies beyond the guest-physical address width."""


class SlotChangeError(KvmError):
    """A change that an existing slot can not undergo."""


class NoSuchSlotError(KvmError):
    """A slot to be deleted that does not exist."""


class SlotOverlapError(KvmError):
    """Two slots of one address space would overlap."""

    code = _errno.EEXIST


class NoDirtyLogError(KvmError):
    """The slot does not exist or does not log."""

    code = _errno.ENOENT


class DirtyRingInUseError(KvmError):
    """The VM logs to dirty rings: there is no bitmap."""

    code = _errno.ENXIO


class ClearRangeError(KvmError):
    """The page range of KVM_CLEAR_DIRTY_LOG breaks its rounding rules."""


class BufferFaultError(KvmError):
    """A bitmap buffer that can not be read or written."""

    code = _errno.EFAULT


class CapabilityError(KvmError):
    """A capability or its argument is not supported, or comes too late."""


class RingTooLargeError(CapabilityError):
    """A dirty ring above the maximum of 65536 entries."""

    code = _errno.E2BIG


class RingDisabledError(KvmError):
    """KVM_RESET_DIRTY_RINGS on a VM without rings."""


class NoRingIoctlError(RingDisabledError):
    """KVM_RESET_DIRTY_RINGS on a kernel without dirty rings."""

    code = _errno.ENOTTY


class PlatformError(KvmError):
    """A platform or policy that does not exist."""


class OutOfTablesError(KvmError):
    """The arena of page-table pages is full."""

    code = _errno.ENOMEM


class HostRangeError(KvmError):
    """Host memory that an operation names does not exist, or the operation does not."""


class MmuPagesError(KvmError):
    """A limit of shadow pages below KVM's minimum."""


class ClosedError(KvmError):
    """The VM was closed."""

    code = _errno.EBADF


class NestedError(KvmError):
    """L2 entered or left where it can not be, or with tables that the platform does not take."""


class GuestTablesError(KvmError):
    """Guest page tables that can not be written as asked for."""


class PrefaultError(KvmError):
    """KVM_PRE_FAULT_MEMORY on a range that is malformed, or on a kernel that does not have it."""


class PrefaultHoleError(PrefaultError):
    """KVM_PRE_FAULT_MEMORY on a gpa without a memslot."""

    code = _errno.ENOENT


class PrefaultUnsupportedError(PrefaultError):
    """KVM_PRE_FAULT_MEMORY under shadow paging."""

    code = _errno.EOPNOTSUPP


class PrefaultHostError(PrefaultError):
    """KVM_PRE_FAULT_MEMORY on memory that the host does not give."""

    code = _errno.EFAULT


class InvariantError(AssertionError):
    """A structural or logging-state invariant does not hold."""


class SmmError(KvmError):
    """System management mode entered or left where it can not be, or without memory for the saved state."""


class VcpuExistsError(KvmError):
    """A vCPU with an id that another one of the VM has."""

    code = _errno.EEXIST


class KernelWarning(RuntimeWarning):
    """The kernel would have warned, by WARN_ON_ONCE; given once for each VM."""


class DirtyLoggingLeak(RuntimeWarning):
    """A VM was destroyed while memslots logged."""
