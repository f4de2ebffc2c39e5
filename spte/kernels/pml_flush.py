"""PML flush on plain arrays. A VM's vCPUs drain theirs in `spte.pml`."""

from __future__ import annotations

import numpy as np

from spte._jit import kernel
from spte.bits import ONE, SHIFT_PAGE, U64
from spte.context import U64s
from spte.kernels._plain import plain


@kernel
def _flush(buffer, index, bitmap, base_gfn, npages):
    marked = 0
    first = np.int64(0) if index > 511 else index + 1
    for at in range(first, 512):
        page = np.int64(buffer[at] >> SHIFT_PAGE) - base_gfn
        if 0 <= page < npages:
            bit = ONE << U64(page & 63)
            marked += (bitmap[page >> 6] & bit) == U64(0)
            bitmap[page >> 6] |= bit
    return marked


def pml_flush(buffer: U64s, index: int, bitmap: U64s, base_gfn: int = 0) -> int:
    """Set the bit of every logged page; the caller sets the PML index to 511 afterwards.

    Parameters
    ----------
    buffer : ndarray of uint64[512]
        Logged guest-physical addresses, bytes; filled from entry 511 down; not changed.
    index : int
        PML index: 511 = empty, 0xFFFF = full; entries ``index + 1 .. 511`` are valid, all 512 if it is above 511.
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
        `buffer` is not 512 uint64, `bitmap` is not a writable C-contiguous uint64 array, `index` is not in 0..511 or 0xFFFF.
    """
    if plain(buffer, "buffer").shape != (512,):
        raise ValueError(f"buffer has shape {buffer.shape}; a PML buffer is 512 entries")
    if not (0 <= index <= 511 or index == 0xFFFF):
        raise ValueError(f"index={index} is not in 0..511 or 0xFFFF")
    flat = plain(bitmap, "bitmap").reshape(-1)
    return int(_flush(buffer, index, flat, base_gfn, len(flat) * 64))
