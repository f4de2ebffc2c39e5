"""PML flush: mark what the CPU logged in a dirty bitmap. A VM's vCPUs drain their buffers in `spte.mmu.dirty_log.pml`."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from spte._arguments import as_array, spell
from spte._numba.atomics import fetch_or, load
from spte._numba.jit import helper, kernel, kernel_noinline, prefetch
from spte.arrays.records import U64s
from spte.bits import ONE, SHIFT_PAGE, U64, ZERO
from spte.kernels._bitmap import WORD_MASK, WORD_SHIFT
from spte.kernels._check import GFN_END, PAGE_ENTRIES, changed, integer, only_read, separate

AHEAD = U64(32)  # entries
EMPTY, FULL = 511, 0xFFFF  # PML index


@kernel_noinline
def mark_run(log, first, end, words, start, base, npages, shared):
    """Set the bits of ``log[first:end]`` in the slot's bitmap, which begins at word `start`, up to the first gfn outside the slot.

    Returns ``(place of that entry, else end; bits that were clear)``. Words are prefetched as the loop goes, across buffers: 1.4 times
    a bare scatter in 1 TiB; without 2.1, those of a full buffer before the loop 2.6. With a VM's lookup of the slot in this loop it
    took 1.5 times as long. `shared`: others set and take bits meanwhile.
    """
    marked = ZERO
    last = U64(log.shape[0] - 1)
    for at in range(U64(first), U64(end)):
        ahead = U64(np.int64(log[min(at + AHEAD, last)] >> SHIFT_PAGE) - base)
        prefetch(words, np.int64(start + (ahead >> WORD_SHIFT)))
        page = U64(np.int64(log[at] >> SHIFT_PAGE) - base)  # below the slot: wraps, and is past its end
        if page >= npages:
            return np.int64(at), marked
        w = start + (page >> WORD_SHIFT)
        bit = page & WORD_MASK
        word = load(words, np.int64(w)) if shared else words[w]
        marked += ~(word >> bit) & ONE
        if not shared:
            words[w] = word | (ONE << bit)
        elif (word >> bit) & ONE == ZERO:
            fetch_or(words, np.int64(w), ONE << bit)
    return np.int64(end), marked


@helper
def first_logged(index):
    """Return the first valid entry of a buffer, 512 if there is none."""
    return np.int64(0) if index > EMPTY else index + 1


@kernel
def _pml_flush(log, index, bitmap, base_gfn, npages):
    marked = ZERO
    for n in range(index.shape[0]):
        at, end = n * 512 + first_logged(index[n]), np.int64(n * 512 + 512)
        while at < end:
            at, clear = mark_run(log, at, end, bitmap, ZERO, base_gfn, npages, False)
            marked += clear
            at += 1
    return np.int64(marked)


def pml_flush(buffer: U64s, index: int | npt.ArrayLike, bitmap: U64s, base_gfn: SupportsIndex = 0) -> int:
    """Set the bit of every logged page, as KVM's vmx_flush_pml_buffer does; the caller sets each PML index to 511 afterwards.

    Parameters
    ----------
    buffer : ndarray of uint64[512] or uint64[n, 512], C-contiguous
        Logged guest-physical addresses, bytes; each buffer filled from entry 511 down; not changed, may be read-only.
    index : int, or array_like of n integers
        PML index of each buffer: 511 = empty, 0xFFFF = full; entries ``index + 1 .. 511`` are valid, all 512 if it is 0xFFFF.
    bitmap : ndarray of uint64, any shape, C-contiguous
        Dirty bitmap of a slot, bit 0 of word 0 = `base_gfn`; mutated. Entries outside it are dropped.
    base_gfn : int
        First gfn of the slot.

    Returns
    -------
    int
        Pages newly marked dirty. No SPTE is changed by a flush.

    Raises
    ------
    TypeError, ValueError
        An array is not uint64, not C-contiguous, or shares memory with the other; `buffer` is not rows of 512; `bitmap` is read-only;
        an index or `base_gfn` is not an integer, or out of its range. Nothing is changed.
    """
    log = only_read(buffer, "buffer")
    if log.ndim not in (1, 2) or log.shape[-1] != PAGE_ENTRIES:
        raise ValueError(f"buffer has shape {log.shape}; PML buffers are rows of {PAGE_ENTRIES} entries")
    log = log.reshape(-1)
    indices = _indices(index, len(log) // PAGE_ENTRIES)
    base = integer(base_gfn, "base_gfn", GFN_END)
    flat = changed(bitmap, "bitmap").reshape(-1)
    separate(buffer=log, bitmap=flat)
    return int(_pml_flush(log, indices, flat, np.int64(base), U64(len(flat) * 64)))


def _indices(index: Any, count: int) -> npt.NDArray[np.int64]:
    given = as_array(index, "index") if hasattr(index, "__len__") else np.array([integer(index, "index", FULL + 1)])
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"index={spell(index)} holds {given.dtype}; pass an integer a buffer")
    given = given.reshape(-1)
    if len(given) != count:
        raise ValueError(f"{len(given)} indices for {count} buffers; pass one index a buffer")
    wrong = given[((given < 0) | (given > EMPTY)) & (given != FULL)]
    if len(wrong):
        raise ValueError(f"index={wrong[0]} is not in 0..{EMPTY} or {FULL:#x}")
    return given.astype(np.int64)
