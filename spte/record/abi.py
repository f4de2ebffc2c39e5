"""Two kernel interfaces: userfaultfd(2) and the PAGEMAP_SCAN ioctl of /proc/PID/pagemap.

Source of the numbers: include/uapi/linux/userfaultfd.h and fs.h of Linux 6.7, the first version that has all of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform

from spte.platform import PAGE_SIZE
from spte.record.errors import MissingPieceError
from spte.record.tracing import ptrace
from spte.record.tracing.inject import NR_USERFAULTFD, UFFD_USER_MODE_ONLY

_UFFD_API = 0xAA
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06
_REGISTER_MODE_WP, _WRITEPROTECT_MODE_WP = 1 << 1, 1 << 0
FEATURES = {"PAGEFAULT_FLAG_WP": 1 << 0, "WP_HUGETLBFS_SHMEM": 1 << 12, "WP_UNPOPULATED": 1 << 13, "WP_ASYNC": 1 << 15}
"""WP_ASYNC: the kernel lets a write to an armed page through and notes it. The others are what that takes for all memory."""
_PAGEMAP_SCAN = 0xC0606610
PM_SCAN_WP_MATCHING = 1 << 0
PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PAGE_IS_FILE, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_PFNZERO = (1 << bit for bit in range(6))
_NEEDED = "the kernel tracks written pages since Linux 6.7 (this is {}); take such a kernel"


class _UffdioApi(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("api", "features", "ioctls"))


class _UffdioRegister(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("start", "len", "mode", "ioctls"))


class _UffdioWriteprotect(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("start", "len", "mode"))


class PmScanArg(ctypes.Structure):
    """`struct pm_scan_arg`, the argument of PAGEMAP_SCAN.

    A page matches if its categories, with those of `category_inverted` turned round, hold all of `category_mask` and any of
    `category_anyof_mask`.
    """

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    )  # fmt: skip


def enable(uffd: int) -> None:
    """Arm a new userfaultfd with `FEATURES`.

    Raises
    ------
    MissingPieceError
        If the kernel lacks one; the message names it.
    """
    wanted = _UffdioApi(_UFFD_API, sum(FEATURES.values()))
    try:
        fcntl.ioctl(uffd, _UFFDIO_API, wanted)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise MissingPieceError(
            f"userfaultfd lacks one of {', '.join(FEATURES)}: " + _NEEDED.format(platform.release())
        ) from None


def register(uffd: int, start: int, end: int) -> None:
    """Let `uffd` track the addresses [start, end) of its process; no effect on what it tracks already.

    Raises
    ------
    OSError
        EINVAL, EPERM or EBUSY if a mapping there can not be tracked; ENOMEM also if the process's memory is gone.
    """
    fcntl.ioctl(uffd, _UFFDIO_REGISTER, _UffdioRegister(start, end - start, _REGISTER_MODE_WP))


def write_protect(uffd: int, start: int, end: int) -> None:
    """Arm every page of [start, end), populated or not; this costs page tables, 2 MiB for 1 GiB.

    Raises
    ------
    OSError
        ENOENT if not all of it is registered, ESRCH if the process's memory is gone.
    """
    fcntl.ioctl(uffd, _UFFDIO_WRITEPROTECT, _UffdioWriteprotect(start, end - start, _WRITEPROTECT_MODE_WP))


def has_memory(uffd: int) -> bool:
    """Return whether the address space of `uffd` is still there: its process has neither exited nor performed an exec."""
    try:
        write_protect(uffd, 0, PAGE_SIZE)  # nothing is mapped at address 0, so this changes nothing
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def pagemap_scan(pagemap: int, argument: PmScanArg) -> int:
    """Perform PAGEMAP_SCAN; return the number of ranges put into `vec`, and set `walk_end`."""
    return int(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument))


def make_userfaultfd() -> int:
    """Return a userfaultfd of this process with all features.

    Raises
    ------
    MissingPieceError
        If the machine, the kernel or a seccomp filter does not allow it.
    """
    if platform.machine() != "x86_64":
        raise MissingPieceError(f"recording injects a system call of x86-64; this machine is {platform.machine()}")
    try:
        uffd = ptrace.syscall(NR_USERFAULTFD, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    except OSError as error:
        raise MissingPieceError(
            f"userfaultfd: {error.strerror}; "
            + ("the kernel is built without CONFIG_USERFAULTFD; take one that has it" if error.errno == errno.ENOSYS else
               "a seccomp filter refuses it; in a container run with --security-opt seccomp=unconfined")
        ) from None  # fmt: skip
    try:
        enable(uffd)
    except BaseException:
        os.close(uffd)
        raise
    return uffd


def require() -> None:
    """Check that this host has every piece that recording takes.

    Raises
    ------
    MissingPieceError
        If not; the message names the piece and how to get it.
    """
    os.close(make_userfaultfd())
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap_scan(pagemap.fileno(), PmScanArg(ctypes.sizeof(PmScanArg)))
    except OSError as error:
        if error.errno == errno.EINVAL:  # an empty range is checked after the call itself
            return
        raise MissingPieceError(f"PAGEMAP_SCAN of /proc/PID/pagemap: {error.strerror}; " + _NEEDED.format(platform.release())) from None
