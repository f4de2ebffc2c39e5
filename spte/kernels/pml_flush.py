"""PML flush on plain arrays, one buffer or many. A VM's vCPUs drain theirs in `spte.pml`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spte._jit import kernel, prefetch
from spte.bits import ONE, SHIFT_PAGE, U64
from spte.context import U64s
from spte.kernels._plain import plain

WORD_SHIFT, WORD_MASK = U64(6), U64(63)


@kernel
def _flush(buffers, index, bitmap, base_gfn, npages):
    marked = U64(0)
    for n in range(buffers.shape[0]):
        first = np.int64(0) if index[n] > 511 else index[n] + 1
        for at in range(U64(first), U64(512)):  # asked for together, a buffer's words take 0.7 of a bare scatter; without, 3.5
            prefetch(bitmap, (np.int64(buffers[n, at] >> SHIFT_PAGE) - base_gfn) >> 6)
        for at in range(U64(first), U64(512)):
            page = np.int64(buffers[n, at] >> SHIFT_PAGE) - base_gfn
            if 0 <= page < npages:
                w, shift = U64(page) >> WORD_SHIFT, U64(page) & WORD_MASK
                word = bitmap[w]
                marked += ~(word >> shift) & ONE
                bitmap[w] = word | (ONE << shift)
    return np.int64(marked)


def pml_flush(buffer: U64s, index: int | npt.ArrayLike, bitmap: U64s, base_gfn: int = 0) -> int:
    """Set the bit of every logged page; the caller sets each PML index to 511 afterwards.

    Parameters
    ----------
    buffer : ndarray of uint64[512] or uint64[n, 512]
        Logged guest-physical addresses, bytes; each buffer filled from entry 511 down; not changed.
    index : int, or array_like of n integers
        PML index of each buffer: 511 = empty, 0xFFFF = full; entries ``index + 1 .. 511`` are valid, all 512 if it is above 511.
    bitmap : ndarray of uint64
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
        `buffer` is not rows of 512 uint64, `bitmap` is not a writable C-contiguous uint64 array, an index is not in 0..511 or 0xFFFF.
    """
    if plain(buffer, "buffer").ndim not in (1, 2) or buffer.shape[-1] != 512:
        raise ValueError(f"buffer has shape {buffer.shape}; a PML buffer is 512 entries")
    buffers = buffer.reshape(-1, 512)
    indices = np.array(index, np.int64).reshape(-1)
    if len(indices) != len(buffers):
        raise ValueError(f"{len(indices)} indices for {len(buffers)} buffers; pass one index a buffer")
    wrong = indices[((indices < 0) | (indices > 511)) & (indices != 0xFFFF)]
    if len(wrong):
        raise ValueError(f"index={wrong[0]} is not in 0..511 or 0xFFFF")
    flat = plain(bitmap, "bitmap").reshape(-1)
    return int(_flush(buffers, indices, flat, base_gfn, len(flat) * 64))
