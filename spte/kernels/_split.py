"""Eager split: replace huge leaves by tables of small ones with the same translation and permissions. No flush is needed."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import kernel
from spte.arrays.records import U64s
from spte.bits import LARGE, SHIFT_PAGE, U64, is_leaf
from spte.kernels._check import layout_of, plain, rows
from spte.platform import Platform


@kernel
def _plain_split(sptes, tables, link, level, first_pfn):
    used = 0
    step = U64(1) << (SHIFT_PAGE + U64(9 * (level - 2)))
    for i in range(sptes.shape[0]):
        huge = sptes[i]
        if not is_leaf(huge, level):
            continue
        if used == tables.shape[0]:
            break
        child = huge & ~LARGE if level == 2 else huge
        for j in range(512):
            tables[used, j] = child + U64(j) * step
        sptes[i] = link | (U64(first_pfn + used) << SHIFT_PAGE)
        used += 1
    return used


def split(sptes: U64s, tables: U64s, level: int = 2, *, first_pfn: int = 0, platform: str | Platform = "ept-pml") -> int:
    """Replace huge leaves of `sptes` by links to filled rows of `tables`; no flush is needed.

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
    platform : str or Platform
        Says how a link looks.

    Returns
    -------
    int
        Huge leaves split: rows of `tables` used.

    Raises
    ------
    TypeError, ValueError
        An array is not writable C-contiguous uint64 or has the wrong shape, or `level` is not 2 or 3.
    PlatformError
        The platform is not known.
    """
    if level not in (2, 3):
        raise ValueError(f"level={level} holds no huge leaf to split; take 2 (2 MiB) or 3 (1 GiB)")
    if plain(tables, "tables").ndim != 2 or tables.shape[1] != 512:
        raise ValueError(f"tables has shape {tables.shape}; page-table pages are rows of 512 entries")
    flat = rows(sptes, level).reshape(-1)
    return int(_plain_split(flat, tables, layout_of(platform).link, np.int64(level), np.int64(first_pfn)))
