"""Making, splitting and dropping entries: what faults, splits, harvests and zaps share."""

from __future__ import annotations

import numpy as np

from spte import bits as bt
from spte._numba.atomics import compare_exchange, is_shared, load
from spte._numba.jit import PREFETCHES, helper, kernel_noinline, prefetch
from spte.bits import child_of, is_leaf, is_link
from spte.kernels._split import fill_table, first_child
from spte.mmu.arena import alloc_row, count_leaf, free_row, take_row
from spte.mmu.make_spte import _write_protects_l2, set_executable

_ROLE_LEVEL = bt.U64(0xF)


@helper
def read_spte(t, row, i):
    """Return entry `i` of `row`, read once."""
    return load(t.flat, row * 512 + i) if is_shared(t) else t.sptes[row, i]


@helper
def replace_spte(t, row, i, old, new):
    """Store `new` in entry `i` of `row`; False: another kernel has changed it since it was `old`: KVM's tdp_mmu_set_spte_atomic."""
    if is_shared(t):
        return compare_exchange(t.flat, row * 512 + i, old, new) == old
    t.sptes[row, i] = new
    return True


@helper
def link(t, m, row, i, old, child):
    """Make entry `i` of `row`, which is `old`, point to table `child`; False as `replace_spte`."""
    t.pages[child].parent_ptes = row * 512 + i + 1
    return replace_spte(t, row, i, old, m.lay.link | (bt.U64(child) << bt.SHIFT_PAGE))


@helper
def child_gfn(t, row, i):
    """Return the first gfn of entry `i` of `row`."""
    return t.pages[row].gfn + (np.int64(i) << (9 * (np.int64(t.pages[row].level) - 1)))


@helper
def _child_role(t, row):
    return (bt.U64(t.pages[row].role) & ~_ROLE_LEVEL) | bt.U64(np.int64(t.pages[row].level) - 1)


@helper
def new_child(t, m, row, i):
    """Take an empty table for entry `i` of `row`, not linked yet; returns its row, -1 if the arena is full."""
    level = np.int64(t.pages[row].level) - 1
    return alloc_row(t, level, child_gfn(t, row, i), _child_role(t, row), m.lay.nonpresent)


@kernel_noinline
def split_entry(t, m, row, i):
    """Replace a huge leaf by a table of 512 leaves that inherit its bits: KVM's tdp_mmu_split_huge_page.

    Returns the table, -1 if the arena is full. No flush: every translation stays as it was.
    """
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    child = take_row(t, level - 1, child_gfn(t, row, i), _child_role(t, row))
    if child < 0:
        return child
    huge = t.sptes[row, i]
    first = first_child(huge, level)
    if level == 2 and m.nx:
        first = set_executable(first, m.lay, True)
    if kvm.free_row > 0:  # the row taken next: on Zen 5 an entry takes 0.32 ns, not 0.41
        for line in range(PREFETCHES):
            prefetch(t.flat, np.int64(kvm.free_row - 1) * 512 + line * 8)
    fill_table(t.flat, child, first, level - 1)
    link(t, m, row, i, huge, child)
    t.pages[child].full = level == 2
    kvm.splits[level - 1] += 1
    kvm.sptes_written += 513
    count_leaf(t, level, -1)
    count_leaf(t, level - 1, 512)
    return child


@helper
def split_below(t, m, row, i, start, end):
    """Split the huge leaf at entry `i` of `row` down to 4 KiB where it meets gfns ``[start, end)``; returns leaves split."""
    child = split_entry(t, m, row, i)
    if child < 0:
        return 0
    done = 1
    if t.pages[child].level == 2:
        base = t.pages[child].gfn
        for j in range(512):
            if base + (j + 1) * 512 > start and base + j * 512 < end:
                if split_entry(t, m, child, j) < 0:
                    return done
                done += 1
    return done


@helper
def drop_nx_mark(t, row):
    """Forget that the NX mitigation holds table `row` down, if it does."""
    if t.pages[row].nx_huge_page_disallowed == 2:
        t.kvm[0].nx_lpage_splits -= 1
    t.pages[row].nx_huge_page_disallowed = 0


@kernel_noinline
def _count_leaves(t, row, level):
    """Return how many entries of `row` are leaves."""
    leaves = 0
    for i in range(512):
        leaves += is_leaf(t.sptes[row, i], level)
    return leaves


@helper
def _free_one(t, row):
    """Free one table, its leaves counted out; returns them."""
    page = t.pages[row]
    level = np.int64(page.level)
    leaves = 512  # a table that a split has filled is not read again: recovery of 2 MiB takes 20 ns, not 470
    if not page.full:
        leaves = _count_leaves(t, row, level)
    if level <= 3:
        count_leaf(t, level, -leaves)
    drop_nx_mark(t, row)
    free_row(t, row)
    return leaves


@kernel_noinline
def _free_below(t, row):
    """Free all tables below `row`; returns the leaves dropped."""
    dropped = 0
    for i in range(512):
        if not is_link(t.sptes[row, i]):
            continue
        upper = child_of(t.sptes[row, i])
        if t.pages[upper].level > 1:
            for j in range(512):
                if not is_link(t.sptes[upper, j]):
                    continue
                lower = child_of(t.sptes[upper, j])
                if t.pages[lower].level > 1:
                    for k in range(512):
                        if is_link(t.sptes[lower, k]):
                            dropped += _free_one(t, child_of(t.sptes[lower, k]))
                dropped += _free_one(t, lower)
        dropped += _free_one(t, upper)
    return dropped


@helper
def free_table(t, row):
    """Free table `row` with all below it and count its leaves out; returns the leaves dropped. The caller has unlinked it."""
    dropped = _free_below(t, row) if t.pages[row].level > 1 else 0
    return dropped + _free_one(t, row)


@helper
def drop_entry(t, m, row, i):
    """Make entry `i` of `row` non-present with all below it; returns the leaves dropped."""
    kvm = t.kvm[0]
    spte = t.sptes[row, i]
    level = np.int64(t.pages[row].level)
    t.sptes[row, i] = m.lay.nonpresent
    t.pages[row].full = 0
    dropped = 0
    if (spte & bt.MMU_PRESENT) == bt.ZERO:
        return 0
    if level > 1 and is_link(spte):
        dropped = free_table(t, child_of(spte))
    else:
        count_leaf(t, level, -1)
        dropped = 1
    kvm.zapped += dropped
    kvm.sptes_written += 1
    return dropped


@helper
def log_shift(t, m, row):
    """Return the place of the bit that dirty logging clears in the leaves of `row`: D, or W where D does not serve."""
    role = np.int64(t.pages[row].role)
    if m.dirty_log_size == 0 or role & bt.ROLE_AD_DISABLED or _write_protects_l2(m, role):
        return bt.W_SHIFT
    return m.lay.dirty_shift
