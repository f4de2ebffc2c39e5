"""Harvest and re-arm: exchange each word of a dirty bitmap with 0 and make the next write to its pages visible again.

Order is bit -> protect -> flush -> return: a write through a stale TLB entry before the flush is covered, because the page is
reported already and read after the return. The caller must be alone on the tables and flushes if a word was not 0.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import ctz, kernel
from spte.arrays.records import U64s
from spte.bits import ONE, PRESENT_SHIFT, TYPE_MASK, W_SHIFT, ZERO
from spte.kernels._check import layout_of, plain, resolve
from spte.platform import Platform


@kernel
def _plain_harvest(sptes, bitmap, out, dirty_shift):
    changed = ZERO
    for w in range(bitmap.shape[0]):
        mask = bitmap[w]
        out[w] = mask
        bitmap[w] = ZERO
        while mask != ZERO:
            j = (w << 6) + ctz(mask)
            mask &= mask - ONE
            s = sptes[j]
            shift = dirty_shift if (s & TYPE_MASK) == ZERO else W_SHIFT
            d = (s >> shift) & (s >> PRESENT_SHIFT) & ONE
            changed += d
            sptes[j] = s ^ (d << shift)
    return np.int64(changed)


def harvest(sptes: U64s, bitmap: U64s, out: U64s | None = None, *, platform: str | Platform = "ept-pml") -> int:
    """Move `bitmap` to `out`, clear it and re-arm the entries of its set bits; the caller must flush if `out` is not all 0.

    Parameters
    ----------
    sptes : ndarray of uint64[npages], C-contiguous
        Level-1 entries of a slot in the order of its pages; mutated: D (or W where the A/D type is not 0, or the platform has no
        PML) is cleared in present entries whose bit is set.
    bitmap : ndarray of uint64[ceil(npages / 64)]
        Dirty bitmap, bit 0 of word 0 = first page; mutated: all 0 afterwards.
    out : ndarray of uint64[ceil(npages / 64)], optional
        Receives what `bitmap` held; mutated.
    platform : str or Platform
        Says where D lies and whether PML logs it.

    Returns
    -------
    int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        An array is not writable C-contiguous uint64, or the sizes do not fit each other.
    PlatformError
        The platform is not known.
    """
    lay = layout_of(platform)
    flat = plain(sptes, "sptes").reshape(-1)
    words = (len(flat) + 63) // 64
    out = np.empty_like(bitmap) if out is None else out
    for name, array in (("bitmap", bitmap), ("out", out)):
        if plain(array, name).shape != (words,):
            raise ValueError(f"{name} has shape {array.shape}; {len(flat)} pages need ({words},)")
    tail = len(flat) % 64
    if tail and int(bitmap[-1]) >> tail:
        raise ValueError(f"bitmap has bits set beyond page {len(flat) - 1}; clear them")
    shift = lay.dirty_shift if resolve(platform).pml else W_SHIFT
    return int(_plain_harvest(flat, bitmap, out, shift))
