"""Which part of a table row a gfn range meets: what sweeps in arena order share."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.bits import INDEX_BITS, LARGE_SHIFT, ONE, ROLE_IS_DIRECT, ROLE_SMM_SHIFT, U64, ZERO
from spte.kernels._entries import clear_entry

GFN_SHIFT = U64(3)  # of an entry of Tables.shadowed


@helper
def place(t, row, as_id, start, end):
    """Return the half-open index range of `row` whose leaves lie in gfns ``[start, end)``; empty if none may."""
    level = np.int64(t.pages[row].level)
    if np.int64(t.pages[row].role) >> ROLE_SMM_SHIFT != as_id:
        return 0, 0
    shift = 9 * (level - 1)
    base = t.pages[row].gfn
    lo = np.int64(0)
    hi = np.int64(512)
    if start > base:
        lo = (start - base) >> shift
    if end < base + (np.int64(512) << shift):
        hi = (end - base + (np.int64(1) << shift) - 1) >> shift
    return lo, hi


@kernel
def is_indirect(t, row):
    """Tell whether the entries of `row` map what a guest table says, not gfns one after the other."""
    return t.pages[row].shadow == 1 and np.int64(t.pages[row].role) & ROLE_IS_DIRECT == 0


@helper
def clear_indirect(t, row, as_id, start, end, shift):
    """Clear bit `shift` in the present leaves of an indirect `row` that map gfns ``[start, end)``; returns SPTEs changed."""
    if np.int64(t.pages[row].role) >> ROLE_SMM_SHIFT != as_id:
        return np.int64(0)
    changed, small = ZERO, U64(t.pages[row].level == 1)
    for i in range(ONE << INDEX_BITS):
        if start <= np.int64(t.shadowed[row, i] >> GFN_SHIFT) < end:
            at = (U64(row) << INDEX_BITS) + i
            changed += clear_entry(t.flat, at, shift, shift, small | (t.flat[at] >> LARGE_SHIFT), False)
    return np.int64(changed)
