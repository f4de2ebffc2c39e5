"""Reserved arrays: address space now, memory when touched."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.errors import OutOfTablesError

_SMALL = 4 << 20  # bytes that stay on small pages, so that a small VM costs little
PAGE, RETURN_BYTES = mmap.PAGESIZE, 1 << 20
_NORESERVE = 0x4000 if hasattr(mmap, "MAP_ANONYMOUS") else 0  # Linux MAP_NORESERVE; absent from the mmap module before 3.13


def reserve(dtype: npt.DTypeLike, *shape: int, huge: bool = False) -> npt.NDArray[Any]:
    """Return a zeroed array whose untouched pages cost nothing; halve the first dimension while the host refuses.

    Parameters
    ----------
    dtype : dtype
        Element type.
    *shape : int
        Wanted shape, elements; only the first may come out smaller.
    huge : bool
        Ask for huge pages behind the first 4 MiB: random access then misses the host's TLB less.

    Returns
    -------
    ndarray
        C-contiguous and writable; it keeps its mapping alive.
    """
    first, *rest = shape
    while first:
        count = first * int(np.prod(rest, dtype=np.int64))
        size = count * np.dtype(dtype).itemsize
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
            mapping = mmap.mmap(-1, size, flags=flags)
            if huge and size > _SMALL:
                with contextlib.suppress(AttributeError, OSError):  # a host without transparent huge pages
                    mapping.madvise(mmap.MADV_HUGEPAGE, _SMALL, size - _SMALL)
            view = memoryview(mapping)
            return np.frombuffer(view, dtype=dtype).reshape(first, *rest)
        except (OSError, ValueError):
            first //= 2
    raise OutOfTablesError(f"the host refuses to reserve memory for {shape} of {np.dtype(dtype)}; free some")


def _zero(array: npt.NDArray[Any], start: int, end: int) -> None:
    """Zero ``array[start:end]`` of a reserved array; whole pages go back to the host instead of being written."""
    item = array.dtype.itemsize
    first, last = -(-start * item // PAGE) * PAGE, end * item // PAGE * PAGE
    if last - first < RETURN_BYTES:
        array[start:end] = 0
        return
    array[start : first // item] = 0
    array[last // item : end] = 0
    base: Any = array
    while not isinstance(base, memoryview):
        base = base.base
    mapping: Any = base.obj
    mapping.madvise(mmap.MADV_DONTNEED, first, last - first)  # private anonymous memory reads as zero afterwards


class Pool:
    """Ranges of one reserved array, handed out zeroed, first fit, and taken back.

    Parameters
    ----------
    dtype : dtype
        Element type of the array.
    capacity : int
        Elements.
    """

    def __init__(self, dtype: npt.DTypeLike, capacity: int) -> None:
        self.array = reserve(dtype, capacity, huge=True)
        self._high = 0
        self._free: list[tuple[int, int]] = []

    def take(self, count: int) -> int:
        """Return the offset of `count` zeroed elements; OutOfTablesError (ENOMEM) if none are left."""
        for i, (offset, size) in enumerate(self._free):
            if size >= count:
                self._free[i : i + 1] = [(offset + count, size - count)] if size > count else []
                return offset
        if self._high + count > len(self.array):
            raise OutOfTablesError(f"no room for {count} more elements beside {self._high}; delete slots")
        self._high += count
        return self._high - count

    def take_all(self, counts: list[int]) -> list[int]:
        """Return the offsets of ranges of `counts` elements; OutOfTablesError, and none is taken, if there is no room for one."""
        offsets: list[int] = []
        try:
            for count in counts:
                offsets.append(self.take(count))  # noqa: PERF401
        except OutOfTablesError:
            for offset, count in zip(offsets, counts, strict=False):
                self.give(offset, count)
            raise
        return offsets

    def give(self, offset: int, count: int) -> None:
        """Take the range back, zero it and join it with its free neighbours."""
        if count == 0:
            return
        _zero(self.array, offset, offset + count)
        self._free.append((offset, count))
        self._free.sort()
        joined: list[tuple[int, int]] = []
        for start, size in self._free:
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        if joined and joined[-1][0] + joined[-1][1] == self._high:
            self._high = joined.pop()[0]
        self._free = joined
