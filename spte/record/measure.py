"""What tracking costs on this host, measured on memory of this process: the first write of an epoch, and a scan."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from spte.platform import PAGE_SIZE
from spte.record import abi


class Costs(NamedTuple):
    """Nanoseconds a page of 4 KiB."""

    first_write: float
    """The first write of an epoch: the fault that it takes, in which the kernel notes the page."""
    later_write: float
    """Any later one, which takes no fault."""
    scan_idle: float
    """A scan, for a page in memory that was not written."""
    scan_written: float
    """A scan, for a page that was written: it is reported and armed again."""


def measure(npages: int, rounds: int) -> Costs:
    """Return the least costs of `rounds` rounds over a mapping of `npages` pages.

    Raises
    ------
    MissingPieceError
        If the host can not track pages.
    """
    uffd = abi.make_userfaultfd()
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    memory = mmap.mmap(-1, npages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        pages = np.frombuffer(memory, np.uint8)[::PAGE_SIZE]
        start = pages.ctypes.data
        vec = np.zeros((64, 3), np.uint64)
        wanted = abi.PAGE_IS_PFNZERO | abi.PAGE_IS_WPALLOWED | abi.PAGE_IS_WRITTEN
        argument = abi.PmScanArg(
            size=ctypes.sizeof(abi.PmScanArg), flags=abi.PM_SCAN_WP_MATCHING, start=start, end=start + npages * PAGE_SIZE,
            vec=vec.ctypes.data, vec_len=len(vec), category_inverted=abi.PAGE_IS_PFNZERO, category_mask=wanted,
            category_anyof_mask=abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED,
        )  # fmt: skip

        def write() -> None:
            pages[:] = 1

        def scan() -> None:
            abi.pagemap_scan(pagemap, argument)

        write()
        abi.register(uffd, start, start + npages * PAGE_SIZE)
        scan()
        times = [[_time(step) / npages for step in (write, write, scan, scan)] for _ in range(rounds)]
        first, later, written, idle = np.min(times, axis=0).tolist()
        return Costs(first, later, idle, written)
    finally:
        os.close(uffd)
        os.close(pagemap)


def _time(step: Callable[[], None]) -> int:
    begin = time.perf_counter_ns()
    step()
    return time.perf_counter_ns() - begin
