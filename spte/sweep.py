"""Which part of a table row a gfn range meets: what sweeps in arena order share."""

from __future__ import annotations

import numpy as np

from spte._jit import helper

AS_SHIFT = 24  # role bits 31:24 name the address space


@helper
def place(t, row, as_id, start, end):
    """Return the half-open index range of `row` whose leaves lie in gfns ``[start, end)``; empty if none may."""
    level = np.int64(t.level[row])
    if np.int64(t.role[row]) >> AS_SHIFT != as_id:
        return 0, 0
    shift = 9 * (level - 1)
    base = t.gfn[row]
    lo = np.int64(0)
    hi = np.int64(512)
    if start > base:
        lo = (start - base) >> shift
    if end < base + (np.int64(512) << shift):
        hi = (end - base + (np.int64(1) << shift) - 1) >> shift
    return lo, hi
