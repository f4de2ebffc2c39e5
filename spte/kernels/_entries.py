"""Leaf loops that clear the bit by which the next write to a page is seen. `sptes` is a plain array, tables one after the other.

Each takes two shifts: of the bit to clear in an entry whose A/D type (bits 53:52) is 0, and of the one in an entry of another
type, which needs write protection. A VM's table holds one type: the VM passes one shift twice, and the compiler drops the choice.
"""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import fetch_and, load
from spte._numba.jit import helper
from spte.bits import LARGE_SHIFT, ONE, PRESENT_SHIFT, TYPE_MASK, U64, ZERO


@helper
def clear_entry(sptes, at, shift, typed_shift, wanted, shared):
    """Clear the bit of ``sptes[at]`` if the entry is present and `wanted` is odd; returns SPTEs changed (0 or 1), `np.uint64`.

    `shared`: vCPUs may change it meanwhile, but what is present stays so.
    """
    if shared:
        s = load(sptes, np.int64(at))
        where = shift if (s & TYPE_MASK) == ZERO else typed_shift
        d = (s >> where) & (s >> PRESENT_SHIFT) & wanted & ONE
        if d != ZERO:
            fetch_and(sptes, np.int64(at), ~(ONE << where))
        return d
    # Arithmetic instead of branches: a sweep takes 1.2-1.4x of np.bitwise_and; with branches it took 1.7x.
    s = sptes[at]
    where = shift if (s & TYPE_MASK) == ZERO else typed_shift
    d = (s >> where) & (s >> PRESENT_SHIFT) & wanted & ONE
    sptes[at] = s ^ (d << where)
    return d


@helper
def clear_entries(sptes, lo, hi, shift, typed_shift, huge, shared):
    """Clear the bit in the present leaves ``sptes[lo:hi]``; `huge`: only those with LARGE are. Returns SPTEs changed."""
    changed = ZERO
    if huge:
        for at in range(U64(lo), U64(hi)):
            changed += clear_entry(sptes, at, shift, typed_shift, sptes[at] >> LARGE_SHIFT, shared)
    else:
        for at in range(U64(lo), U64(hi)):
            changed += clear_entry(sptes, at, shift, typed_shift, ONE, shared)
    return np.int64(changed)
