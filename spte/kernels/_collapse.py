"""Collapse: after logging, make huge mappings possible again - by dropping tables (up to 6.12) or in place (6.13 on)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.records import U64s
from spte.bits import LARGE, PFN_MASK, SHIFT_PAGE, U64, is_leaf, is_link
from spte.kernels._check import plain, rows


@kernel
def _plain_collapse(sptes, tables, first_pfn, level):
    done = 0
    low = (U64(1) << (SHIFT_PAGE + U64(9 * (level - 1)))) - (U64(1) << SHIFT_PAGE)
    for i in range(sptes.shape[0]):
        if not is_link(sptes[i]):
            continue
        r = np.int64((sptes[i] & PFN_MASK) >> SHIFT_PAGE) - first_pfn
        if r < 0 or r >= tables.shape[0]:
            continue
        for j in range(512):
            if is_leaf(tables[r, j], level - 1):
                sptes[i] = (tables[r, j] | LARGE) & ~low
                done += 1
                break
    return done


def collapse(sptes: U64s, tables: U64s, level: int = 2, *, first_pfn: int = 0) -> int:
    """Put a huge leaf in place of each link to a table that has a present leaf (6.13's recovery); the caller must flush if not 0.

    Parameters
    ----------
    sptes : ndarray of uint64, any shape, C-contiguous
        Entries of level 2 or 3; mutated. The huge leaf takes its bits from the first present leaf of the table.
    tables : ndarray of uint64[n, 512], C-contiguous
        The tables linked to, each mapping one huge page; not changed. Links to others stay.
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
        An array is not writable C-contiguous uint64 or has the wrong shape, or `level` is not 2 or 3.
    """
    if level not in (2, 3):
        raise ValueError(f"level={level} can not hold a huge leaf; take 2 (2 MiB) or 3 (1 GiB)")
    if plain(tables, "tables").ndim != 2 or tables.shape[1] != 512:
        raise ValueError(f"tables has shape {tables.shape}; page-table pages are rows of 512 entries")
    return int(_plain_collapse(rows(sptes, level).reshape(-1), tables, np.int64(first_pfn), np.int64(level)))
