"""Collapse: after logging, make huge mappings possible again, in place as KVM does from 6.13 on."""

from __future__ import annotations

from typing import SupportsIndex

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays.records import U64s
from spte.bits import INDEX_BITS, LARGE, ONE, SHIFT_PAGE, U64, ZERO, child_of, is_leaf, is_link
from spte.kernels._check import PFN_END, changed, integer, level_of, only_read, separate, tables_of


@helper
def _first_small_leaf(tables, row):
    at = U64(row) << INDEX_BITS
    for j in range(ONE << INDEX_BITS):
        if is_leaf(tables[at + j], 1):
            return tables[at + j]
    return ZERO


@helper
def first_leaf(tables, first_pfn, row, level):
    """Return the first present leaf of table `row`, of `level`, or of a table of `tables` that it links to; 0 if there is none.

    The page frame of row 0 is `first_pfn`.
    """
    if level == 1:
        return _first_small_leaf(tables, row)
    at = U64(row) << INDEX_BITS
    for i in range(ONE << INDEX_BITS):
        spte = tables[at + i]
        if is_leaf(spte, level):
            return spte
        below = child_of(spte) - first_pfn
        if is_link(spte) and 0 <= below < tables.shape[0] >> 9:
            small = _first_small_leaf(tables, below)
            if small != ZERO:
                return small
    return ZERO


@helper
def make_huge_spte(small, level):
    """Return `small` as a leaf of `level`: its bits, the address rounded down. KVM's make_huge_spte, without the NX mitigation."""
    return (small | LARGE) & ~((ONE << (SHIFT_PAGE + INDEX_BITS * U64(level - 1))) - (ONE << SHIFT_PAGE))


@kernel
def _collapse(sptes, tables, first_pfn, level):
    done = 0
    for i in range(sptes.shape[0]):
        row = child_of(sptes[i]) - first_pfn
        if is_link(sptes[i]) and 0 <= row < tables.shape[0] >> 9:
            small = first_leaf(tables, first_pfn, row, level - 1)
            if small != ZERO:
                sptes[i] = make_huge_spte(small, level)
                done += 1
    return done


def collapse(sptes: U64s, tables: U64s, level: SupportsIndex = 2, *, first_pfn: SupportsIndex = 0) -> int:
    """Put a huge leaf in place of each link to a table with a present leaf, as KVM's kvm_mmu_recover_huge_pages does.

    The caller must flush TLBs if the result is not 0. KVM does so only where memory allows the huge leaf: that is the caller's to know.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Entries of level 2 or 3; mutated. The huge leaf takes its bits from the first present leaf below the link.
    tables : ndarray of uint64[n, 512], C-contiguous
        The tables linked to, each mapping one huge page; at level 3 also, if they are to be looked into, those that these link to. Not
        changed, may be read-only. Links to other tables stay.
    level : int
        Level of `sptes`, 2 or 3.
    first_pfn : int
        Page frame number of row 0 of `tables`.

    Returns
    -------
    int
        SPTEs changed.

    Raises
    ------
    TypeError, ValueError
        An array is not uint64, not C-contiguous, of the wrong shape, or shares memory with the other; `sptes` is read-only; `level` is not
        2 or 3; `first_pfn` is not an integer, or a row's page frame number has more than 40 bits. Nothing is changed.
    """
    number = level_of(level, least=2)
    flat, rows = changed(sptes, "sptes").reshape(-1), tables_of(only_read(tables, "tables"), "tables")
    separate(sptes=flat, tables=rows)
    pfn = integer(first_pfn, "first_pfn", PFN_END - len(rows) + 1)
    return int(_collapse(flat, rows.reshape(-1), np.int64(pfn), np.int64(number)))
