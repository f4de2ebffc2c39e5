"""Clear-dirty: take from each leaf the bit that its next write sets again - D, or W where a write is seen by its fault.

The caller must be alone on the tables and must flush: a TLB that caches D=1 logs nothing.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays.records import U64s
from spte.bits import LARGE_SHIFT, ONE, PRESENT_SHIFT, TYPE_MASK, U64, W_SHIFT, ZERO
from spte.kernels._check import layout_of, rows
from spte.platform import Platform


@helper
def clear_entries(sptes, row, lo, hi, shift, huge):
    """Clear bit `shift` in the present leaves ``sptes[row, lo:hi]``; `huge`: only entries with LARGE are leaves."""
    changed = ZERO
    if huge:
        for j in range(U64(lo), U64(hi)):
            s = sptes[row, j]
            d = (s >> shift) & (s >> PRESENT_SHIFT) & (s >> LARGE_SHIFT) & ONE
            changed += d
            sptes[row, j] = s ^ (d << shift)
    else:
        for j in range(U64(lo), U64(hi)):
            s = sptes[row, j]
            d = (s >> shift) & (s >> PRESENT_SHIFT) & ONE
            changed += d
            sptes[row, j] = s ^ (d << shift)
    return np.int64(changed)


@kernel
def _each(sptes, dirty_shift, huge):
    changed = ZERO
    for row in range(sptes.shape[0]):
        for j in range(sptes.shape[1]):
            s = sptes[row, j]
            shift = dirty_shift if (s & TYPE_MASK) == ZERO else W_SHIFT
            leaf = (s >> PRESENT_SHIFT) & ((s >> LARGE_SHIFT) | (ZERO if huge else ONE)) & ONE
            d = (s >> shift) & leaf
            changed += d
            sptes[row, j] = s ^ (d << shift)
    return np.int64(changed)


def clear_dirty(sptes: U64s, level: int = 1, *, platform: str | Platform = "ept-pml") -> int:
    """Clear D in every present leaf of `sptes`, W where the A/D type (bits 53:52) is not 0; the caller must flush if not 0.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Page-table entries of one level; mutated.
    level : int
        Level of the entries: at 2 and 3 only entries with LARGE (bit 7) are leaves.
    platform : str or Platform
        Says where D lies: bit 9 with EPT, bit 6 with NPT.

    Returns
    -------
    int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        `sptes` is not a writable C-contiguous uint64 array, or `level` is not 1, 2 or 3.
    PlatformError
        The platform is not known.
    """
    return int(_each(rows(sptes, level), layout_of(platform).dirty_shift, level > 1))
