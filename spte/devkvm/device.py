"""A VM, its vCPUs and host memory on /dev/kvm, with the calls of `spte.VM`: the ops of a recording find the same on both sides."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.arrays.records import U64s
from spte.devkvm import abi
from spte.errors import KvmError
from spte.platform import PAGE_SIZE
from spte.vm.vcpu import DIRTY_GFN

PATH = "/dev/kvm"
BAD_POINTER = 8  # what a recording's badptr=1 gives KVM
_CANARY = np.uint64(0xA5A5_A5A5_A5A5_A5A5)
_GUARD_WORDS = 8
_MAP_NORESERVE, _MAP_HUGETLB, _MAP_HUGE_SHIFT = 0x4000, 0x40000, 26
_libc = ctypes.CDLL(None, use_errno=True)


class NoKvmError(Exception):
    """The host's KVM can not be used; the text says why, and how to get it."""


class IoctlError(KvmError):
    """An ioctl of the host's KVM that failed; ``errno`` is the kernel's."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


def ioctl(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """Do an ioctl; IoctlError if it fails. A bytearray takes what the kernel writes back."""
    given: Any
    if isinstance(argument, int):
        given = ctypes.c_ulong(argument)
    else:
        held = ctypes.c_char * len(argument)
        given = held.from_buffer(argument) if isinstance(argument, bytearray) else held.from_buffer_copy(argument)
    result = int(_libc.ioctl(fd, ctypes.c_ulong(request), given))
    if result < 0:
        code = ctypes.get_errno()
        raise IoctlError(code, f"ioctl {request:#x}: {os.strerror(code)}")
    return result


def open_kvm() -> int:
    """Return a descriptor of /dev/kvm; NoKvmError says what the host lacks."""
    try:
        fd = os.open(PATH, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoKvmError(f"there is no {PATH}: load kvm_intel or kvm_amd, or take a host with virtualization") from None
    except OSError as error:
        raise NoKvmError(f"{PATH} can not be opened ({error.strerror}): be its owner, or in its group") from None
    try:
        version = ioctl(fd, abi.GET_API_VERSION)
    except IoctlError as error:
        version = error.code
    if version != abi.API_VERSION:
        os.close(fd)
        raise NoKvmError(f"{PATH} speaks API version {version}, not {abi.API_VERSION}")
    return fd


def _u64(number: int) -> int:
    return number % (1 << 64)


class HostMemory:
    """Anonymous memory of this process, mapped like the host memory of a recording.

    Parameters
    ----------
    size, align, offset : int
        Bytes; the address is `offset` modulo `align`.
    huge : bool or None
        Transparent huge pages asked for, or refused; None: neither.
    shared : bool
        Shared, not private.
    hugetlb : int
        log2 of the page size of hugetlbfs memory; 0: ordinary pages. OSError ENOMEM if the host has none.
    """

    def __init__(
        self, size: int, *, align: int = 1 << 21, offset: int = 0, huge: bool | None = None, shared: bool = False, hugetlb: int = 0
    ) -> None:
        flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE)
        flags |= _MAP_HUGETLB | hugetlb << _MAP_HUGE_SHIFT if hugetlb else _MAP_NORESERVE
        room = size if hugetlb else size + align + offset
        self.size = size
        self._map = mmap.mmap(-1, -(-room >> hugetlb << hugetlb) if hugetlb else room, flags=flags)
        whole: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        start = 0 if hugetlb else (-whole.ctypes.data % align) + offset
        self._start = start
        self.bytes = whole[start : start + size]
        """View of the memory, uint8."""
        self.hva = int(whole.ctypes.data) + start
        self._writable = np.ones(-(-size // PAGE_SIZE), np.bool_)
        if huge is not None and not hugetlb:
            self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE, start, size)

    def fill(self, value: int, *offsets: int) -> None:
        """Store `value`, one byte, at each of `offsets` of every page."""
        for offset in offsets:
            self.bytes[offset::PAGE_SIZE] = value

    def write(self, first: int, count: int) -> None:
        """Store into pages ``[first, first + count)``; OSError EFAULT if one is protected."""
        if not self._writable[first : first + count].all():
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        self.bytes[first * PAGE_SIZE : (first + count) * PAGE_SIZE : PAGE_SIZE] |= 0

    def advise(self, advice: int, first: int, count: int) -> None:
        """Call madvise on pages ``[first, first + count)``; OSError as it fails."""
        self._map.madvise(advice, self._start + first * PAGE_SIZE, count * PAGE_SIZE)

    def protect(self, prot: int, first: int, count: int) -> None:
        """Call mprotect on pages ``[first, first + count)``; OSError as it fails."""
        if _libc.mprotect(ctypes.c_void_p(self.hva + first * PAGE_SIZE), ctypes.c_size_t(count * PAGE_SIZE), prot):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._writable[first : first + count] = bool(prot & mmap.PROT_WRITE)

    def table(self, page: int) -> U64s:
        """Return the 512 words of a page."""
        return self.bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].view(np.uint64)


class HostVcpu:
    """One vCPU of the host's KVM: its descriptor, `struct kvm_run`, and its dirty ring."""

    def __init__(self, kvm: int, vm: int, vcpu_id: int, ring_bytes: int) -> None:
        self.fd = ioctl(vm, abi.CREATE_VCPU, vcpu_id)
        self.run = mmap.mmap(self.fd, ioctl(kvm, abi.GET_VCPU_MMAP_SIZE))
        self._ring = mmap.mmap(self.fd, ring_bytes, offset=abi.DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE) if ring_bytes else None

    @property
    def ring(self) -> npt.NDArray[Any]:
        """View of the dirty ring, as `VirtualCpu.ring`."""
        return np.frombuffer(self._ring, DIRTY_GFN) if self._ring is not None else np.zeros(0, DIRTY_GFN)

    def prefault(self, gpa: int, size: int, flags: int) -> tuple[int, int]:
        """KVM_PRE_FAULT_MEMORY; returns address and bytes that are left."""
        argument = bytearray(abi.PRE_FAULT.pack(_u64(gpa), _u64(size), _u64(flags)))
        ioctl(self.fd, abi.PRE_FAULT_MEMORY, argument)
        left_gpa, left_size, _ = abi.PRE_FAULT.unpack(argument)
        return int(left_gpa), int(left_size)

    def set_msr(self, index: int, data: int) -> int:
        """KVM_SET_MSRS of one; returns how many were set."""
        return ioctl(self.fd, abi.SET_MSRS, bytearray(abi.MSRS.pack(1, 0, index, 0, _u64(data))))

    def close(self) -> None:
        """Unmap and close it."""
        self.run.close()
        if self._ring is not None:
            self._ring.close()
        os.close(self.fd)


class HostVm:
    """A VM of the host's KVM. Its calls are those of `spte.VM`, and raise IoctlError.

    Parameters
    ----------
    kvm : int
        Descriptor of /dev/kvm.
    vcpus : int
        vCPUs made with it, after the ring was enabled.
    ring_bytes : int
        Dirty ring of each vCPU; 0 = bitmaps.
    """

    def __init__(self, kvm: int, vcpus: int = 1, ring_bytes: int = 0) -> None:
        self._kvm, self.fd = kvm, ioctl(kvm, abi.CREATE_VM)
        self._npages: dict[int, int] = {}
        self.vcpus: list[HostVcpu] = []
        try:
            if ring_bytes:
                self.enable_cap(abi.CAP_RING_ACQ_REL, ring_bytes)
            self.vcpus += [HostVcpu(kvm, self.fd, n, ring_bytes) for n in range(vcpus)]
        except BaseException:
            self.close()
            raise

    def set_memory_region(
        self, slot: int, gpa: int, size: int, backing: HostMemory | None = None, *, offset: int = 0, flags: int = 0, hva: int | None = None
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; parameters as `VM.set_memory_region`."""
        address = backing.hva + offset if backing is not None else hva or 0
        ioctl(self.fd, abi.SET_USER_MEMORY_REGION, abi.REGION.pack(slot, flags, _u64(gpa), _u64(size), _u64(address)))
        self._npages[slot] = size // PAGE_SIZE

    def get_dirty_log(self, slot: int, out: U64s | None = None) -> U64s:
        """KVM_GET_DIRTY_LOG; returns the words that the kernel has written. An `out` that holds nothing stands for a bad pointer."""
        words = -(-self._npages.get(slot, 0) // 64)
        buffer = np.full(words + _GUARD_WORDS, _CANARY)
        pointer = int(buffer.ctypes.data) if out is None else BAD_POINTER
        ioctl(self.fd, abi.GET_DIRTY_LOG, abi.DIRTY_LOG.pack(slot, 0, pointer))
        behind = np.flatnonzero(buffer[words:] != _CANARY)
        return buffer[: words + (int(behind[-1]) + 1 if behind.size else 0)]

    def get_dirty_log_into(self, slot: int, words: U64s) -> None:
        """KVM_GET_DIRTY_LOG into `words`, at least uint64[ceil(npages / 64)], which is mutated."""
        ioctl(self.fd, abi.GET_DIRTY_LOG, abi.DIRTY_LOG.pack(slot, 0, int(words.ctypes.data)))

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: U64s) -> None:
        """KVM_CLEAR_DIRTY_LOG. A read-only `bitmap` that holds nothing stands for a bad pointer."""
        bad = not bitmap.flags.writeable
        buffer = np.zeros(max(len(bitmap), -(-self._npages.get(slot, 0) // 64)) + 1, np.uint64)  # what KVM reads at most
        buffer[: len(bitmap)] = bitmap
        pointer = BAD_POINTER if bad else int(buffer.ctypes.data)
        ioctl(self.fd, abi.CLEAR_DIRTY_LOG, bytearray(abi.CLEAR_LOG.pack(slot, num_pages, _u64(first_page), pointer)))

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS; returns entries freed."""
        return ioctl(self.fd, abi.RESET_DIRTY_RINGS)

    def enable_cap(self, cap: int, arg0: int = 0) -> None:
        """KVM_ENABLE_CAP of the VM."""
        ioctl(self.fd, abi.ENABLE_CAPABILITY, abi.ENABLE_CAP.pack(cap, 0, _u64(arg0), 0, 0, 0))

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION of the VM."""
        return ioctl(self.fd, abi.CHECK_EXTENSION, cap)

    def set_nr_mmu_pages(self, n: int) -> None:
        """KVM_SET_NR_MMU_PAGES."""
        ioctl(self.fd, abi.SET_NR_MMU_PAGES, n)

    def close(self) -> None:
        """Close the VM and its vCPUs: the kernel destroys it."""
        for vcpu in self.vcpus:
            vcpu.close()
        self.vcpus = []
        os.close(self.fd)
