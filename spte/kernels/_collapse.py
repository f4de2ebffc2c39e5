"""Collapse: after logging, make huge mappings possible again - by dropping tables (up to 6.12) or in place (6.13 on)."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel, prefetch
from spte.arrays.context import BASE, COLLAPSED, FLUSHES, NPAGES, SPTES_WRITTEN, U64s
from spte.bits import LARGE, MMU_PRESENT, PFN_MASK, SHIFT_PAGE, U64, ZERO
from spte.kernels._check import plain, rows
from spte.mmu.memslot import max_mapping_level
from spte.mmu.tdp_mmu import drop_entry, free_table, set_executable
from spte.mmu.walk import child_of, count_leaf, index_of, is_leaf, is_link, table_at

AHEAD = 16  # entries; the first leaf of a table that far on is asked for


@helper
def _first_leaf(t, row):
    """Return the first present leaf below table `row`, 0 if there is none."""
    level = np.int64(t.level[row])
    for i in range(512):
        spte = t.sptes[row, i]
        if is_leaf(spte, level):
            return spte
        if level == 2 and is_link(spte):
            child = child_of(spte)
            for j in range(512):
                if (t.sptes[child, j] & MMU_PRESENT) != ZERO:
                    return t.sptes[child, j]
    return ZERO


@helper
def _huge_from(m, small, level):
    """Return `small` as a leaf of `level`: its bits, the address rounded down, not executable under the NX mitigation."""
    huge = (small | LARGE) & ~((U64(1) << (SHIFT_PAGE + U64(9 * (level - 1)))) - (U64(1) << SHIFT_PAGE))
    return set_executable(huge, m.lay, False) if m.nx else huge


@helper
def _collapse_entry(t, m, row, i):
    """Drop the table linked at entry `i` of `row`, or put a huge leaf in its place; returns whether the entry changed."""
    level = np.int64(t.level[row])
    if not m.recover:
        drop_entry(t, m, row, i)
    else:
        child = child_of(t.sptes[row, i])
        small = _first_leaf(t, child)
        if small == ZERO:
            return False
        t.sptes[row, i] = _huge_from(m, small, level)
        free_table(t, child)
        count_leaf(t, level, 1)
        t.meta[SPTES_WRITTEN] += 1
    t.meta[COLLAPSED] += 1
    if m.flush_each:
        t.meta[FLUSHES] += 1
    return True


@kernel
def collapse_slot(t, s, h, m, roots, k):
    """Collapse every table of slot `k` whose gfns may be mapped by one larger leaf, 1 GiB before 2 MiB; returns entries changed.

    With one flush a table they are counted here, else the caller flushes the slot if the result is not 0.
    """
    start = s.table[k, BASE]
    end = start + s.table[k, NPAGES]
    done = 0
    for r in range(roots.shape[0]):
        for level in range(3, 1, -1):
            span = np.int64(1) << (9 * (level - 1))
            gfn = (start + span - 1) & -span
            while gfn < end:
                row = table_at(t, roots[r], gfn, level)
                if row < 0:
                    gfn = (gfn | ((span << 9) - 1)) + 1
                    continue
                first = index_of(gfn, level)
                for i in range(first, min(np.int64(512), first + ((end - gfn + span - 1) >> (9 * (level - 1))))):
                    if i + AHEAD < 512:
                        prefetch(t.flat, child_of(t.sptes[row, i + AHEAD]) * 512)
                    if is_link(t.sptes[row, i]) and max_mapping_level(s, h, k, gfn, m.max_level) >= level:
                        done += _collapse_entry(t, m, row, i)
                    gfn += span
    return done


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
