"""Checks of what the public kernels are given, done once before a kernel runs. A refusal names the one thing that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from spte import _arguments as arguments
from spte.arrays.records import U64s
from spte.bits import PFN_MASK, SHIFT_PAGE

PAGE_ENTRIES = 512
PFN_END = int(PFN_MASK >> SHIFT_PAGE) + 1  # page frame numbers that fit an entry
GFN_END = 1 << 64 - int(SHIFT_PAGE)  # gfns of the addresses that fit 64 bits


class _Writable:
    """A read-only array under the array protocol as a writable one: kernels that only read it need one signature."""

    def __init__(self, array: U64s) -> None:
        self.array = array  # keeps the memory
        face = array.__array_interface__
        self.__array_interface__ = {**face, "data": (face["data"][0], False)}


def _uint64(array: Any, name: str) -> U64s:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is of type {type(array).__name__}; pass an ndarray of uint64")
    if array.dtype != np.uint64:
        raise TypeError(f"{name} holds {array.dtype}; pass an ndarray of uint64")
    return np.asarray(array)


def _laid_out(array: U64s, name: str, way_out: str) -> None:
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} of shape {array.shape} with strides {array.strides} is not C-contiguous; {way_out}")
    if not array.flags.aligned:
        raise ValueError(f"{name} begins at {array.ctypes.data:#x}, which is not a multiple of 8; {way_out}")


def changed(array: Any, name: str) -> U64s:
    """Return an array that a kernel changes as a plain one; TypeError or ValueError say why it can not be changed in place."""
    plain = _uint64(array, name)
    _laid_out(plain, name, "the change is made in place, so pass aligned entries that lie side by side")
    if not plain.flags.writeable:
        raise ValueError(f"{name} is read-only, and this call changes it; pass a writable array")
    return plain


def only_read(array: Any, name: str) -> U64s:
    """Return an array that a kernel only reads, which may be read-only, as the kernel takes it; else TypeError or ValueError."""
    plain = _uint64(array, name)
    _laid_out(plain, name, f"pass np.require({name}, requirements='CA')")
    return plain if plain.flags.writeable else np.asarray(_Writable(plain))


def tables_of(array: U64s, name: str) -> U64s:
    """Return `array` if it is rows of page-table pages; ValueError says its shape."""
    if array.ndim != 2 or array.shape[1] != PAGE_ENTRIES:
        raise ValueError(f"{name} has shape {array.shape}; page-table pages are rows of {PAGE_ENTRIES} entries")
    return array


def separate(**arrays: U64s) -> None:
    """Refuse arrays that share memory with ValueError: what is written to one would change the other."""
    known: list[tuple[str, U64s]] = []
    for name, array in arrays.items():
        for other, earlier in known:
            if np.may_share_memory(earlier, array):  # exact, as all are contiguous
                raise ValueError(f"{name} shares memory with {other}; pass arrays that do not overlap")
        known.append((name, array))


def integer(value: Any, name: str, end: int) -> int:
    """Return `value` if it is an integer from 0 to below `end`; else TypeError or ValueError hold it."""
    return arguments.integer(value, name, ValueError, 0, end)


def level_of(level: Any, *, least: int = 1) -> int:
    """Return `level` if it is one of page-table entries, at least `least`; else TypeError or ValueError hold it."""
    number = arguments.index(level, "level")
    if not least <= number <= 3:
        raise ValueError(f"level={arguments.spell(number)} is not {'1 (4 KiB), ' if least == 1 else ''}2 (2 MiB) or 3 (1 GiB)")
    return number
