"""Eager split: replace huge leaves by tables of small ones with the same translation and permissions. No flush is needed."""

from __future__ import annotations

from typing import SupportsIndex

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays.records import U64s
from spte.bits import INDEX_BITS, LARGE, ONE, SHIFT_PAGE, U64, is_leaf
from spte.kernels._check import PFN_END, changed, integer, level_of, separate, tables_of
from spte.kernels._layout import AnyPlatform, resolve


@helper
def first_child(huge, level):
    """Return the first child of a `huge` leaf of `level`: KVM's make_huge_page_split_spte, without the NX mitigation."""
    return huge & ~LARGE if level == 2 else huge


@helper
def fill_table(sptes, row, first, level):
    """Fill table `row`, of `level`, with 512 leaves side by side in memory, `first` being the first."""
    step = SHIFT_PAGE + INDEX_BITS * U64(level - 1)
    at = U64(row) << INDEX_BITS
    for j in range(ONE << INDEX_BITS):
        sptes[at + j] = first + (j << step)


@kernel
def _split(sptes, tables, link, level, first_pfn):
    used, rows = 0, tables.shape[0] >> 9
    for i in range(sptes.shape[0]):
        huge = sptes[i]
        if not is_leaf(huge, level):
            continue
        if used == rows:
            break
        fill_table(tables, used, first_child(huge, level), level - 1)
        sptes[i] = link | (U64(first_pfn + used) << SHIFT_PAGE)
        used += 1
    return used


def split(sptes: U64s, tables: U64s, level: SupportsIndex = 2, *, first_pfn: SupportsIndex = 0, platform: AnyPlatform = "ept-pml") -> int:
    """Replace huge leaves by links to filled rows of `tables`, as KVM's tdp_mmu_split_huge_page does; no flush is needed.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Entries of level 2 or 3; mutated: each present leaf, in order, becomes a link while rows are left.
    tables : ndarray of uint64[n, 512], C-contiguous
        Empty page-table pages; mutated: row r receives the 512 children of the r-th leaf split.
    level : int
        Level of `sptes`, 2 or 3; the children are of the level below.
    first_pfn : int
        Page frame number of row 0 of `tables`; row r has ``first_pfn + r``.
    platform : str, Platform or KernelLayout
        Says how a link looks; what `spte.kernels.layout` returns saves the look-up.

    Returns
    -------
    int
        Huge leaves split: rows of `tables` used.

    Raises
    ------
    TypeError, ValueError
        An array is not uint64, not C-contiguous, read-only, of the wrong shape, or shares memory with the other; `level` is not 2 or 3;
        `first_pfn` is not an integer, or a row's page frame number has more than 40 bits; `platform` is no platform. Nothing is changed.
    PlatformError
        The platform is not known.
    """
    number, link = level_of(level, least=2), resolve(platform).link
    flat, rows = changed(sptes, "sptes").reshape(-1), tables_of(changed(tables, "tables"), "tables")
    separate(sptes=flat, tables=rows)
    pfn = integer(first_pfn, "first_pfn", PFN_END - len(rows) + 1)
    return int(_split(flat, rows.reshape(-1), link, np.int64(number), np.int64(pfn)))
