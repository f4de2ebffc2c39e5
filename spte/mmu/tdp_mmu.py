"""Making, splitting and dropping entries: what faults, splits, harvests and zaps share."""

from __future__ import annotations

import numpy as np

from spte import bits as bt
from spte._numba.jit import helper
from spte.arrays.context import NX_SPLITS, SPLITS_1G, SPLITS_2M, SPTES_WRITTEN, ZAPPED
from spte.mmu.walk import alloc_row, child_of, count_leaf, free_row, is_leaf, is_link, take_row

_ROLE_LEVEL = bt.U64(0xF)


@helper
def _write_protects_l2(m, role):
    """Tell whether the leaves of `role` are left to write protection, as L2 runs on them and PML logs L1's gfns alone."""
    return m.l2_types and role & bt.ROLE_GUEST_MODE and (m.l2_root_wp or not role & bt.ROLE_CR0_WP)


@helper
def type_of(m, role):
    """Return the A/D type of the entries of a page with `role`."""
    if m.lay.type_root != bt.ZERO or role & bt.ROLE_AD_DISABLED:
        return bt.TYPE_DISABLED
    return bt.TYPE_WRPROT if _write_protects_l2(m, role) else bt.ZERO


@helper
def make_leaf(m, level, pfn, old, prefetch, host_writable, role, access, write):
    """Build a leaf that allows what `access` and `write` say; D as the old value gives it. Marking dirty is the caller's."""
    lay = m.lay
    kind = type_of(m, role)
    spte = bt.MMU_PRESENT | lay.present | kind | lay.memtype | (pfn << bt.SHIFT_PAGE)
    has_ad = kind != bt.TYPE_DISABLED or m.disabled_ad
    if not prefetch and has_ad:
        spte |= lay.accessed
    spte |= lay.x if access & bt.ACC_EXEC else lay.nx
    if access & bt.ACC_USER:
        spte |= lay.user
    if level > 1:
        spte |= bt.LARGE
    if host_writable:
        spte |= lay.host_writable
    if write:
        spte |= lay.mmu_writable | bt.WRITABLE
        # Bit 1 of the raw old value, whatever that value is: up to 6.12 the builder then leaves D out.
        if has_ad and (m.dirty_on_remake or (old & bt.WRITABLE) == bt.ZERO):
            spte |= lay.dirty
    if prefetch and kind == bt.TYPE_DISABLED:
        spte = track_access(spte, lay)
    return spte


@helper
def is_access_tracked(spte):
    """Tell whether R and X of an entry without A/D bits are parked."""
    return (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED and (spte & bt.EPT_RWX) == bt.ZERO


@helper
def track_access(spte, lay):
    """Return an entry without hardware A/D bits with R and X parked, so that its next use faults; W is lost."""
    return (spte | ((spte & bt.EPT_RX) << bt.TRACK_SHIFT)) & ~(bt.EPT_RWX | lay.accessed)


@helper
def is_accessed(m, spte):
    """Tell whether a leaf was used; where no A bit is kept, what is not parked counts as used."""
    if (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED and not m.disabled_ad:
        return not is_access_tracked(spte)
    return (spte & m.lay.accessed) != bt.ZERO


@helper
def make_old(m, spte):
    """Return a leaf whose next use is visible: A clear, or R and X parked where hardware sets no A."""
    return track_access(spte, m.lay) if (spte & bt.TYPE_MASK) == bt.TYPE_DISABLED else spte & ~m.lay.accessed


@helper
def restore_access_tracked(spte, lay):
    """Return `spte` with the parked R and X back in place; W waits for a write fault."""
    saved = (spte >> bt.TRACK_SHIFT) & bt.EPT_RX
    return (spte & ~bt.EPT_RWX & ~(bt.EPT_RX << bt.TRACK_SHIFT)) | saved | lay.accessed


@helper
def set_executable(spte, lay, on):
    """Return a leaf made executable or not, in its parked bits if it is access-tracked."""
    x = lay.x << bt.TRACK_SHIFT if is_access_tracked(spte) else lay.x
    return (spte | x) & ~lay.nx if on else (spte & ~x) | lay.nx


@helper
def link(t, m, row, i, child):
    """Make entry `i` of `row` point to table `child`."""
    t.sptes[row, i] = m.lay.link | (bt.U64(child) << bt.SHIFT_PAGE)
    t.parent[child] = row


@helper
def child_gfn(t, row, i):
    """Return the first gfn of entry `i` of `row`."""
    return t.gfn[row] + (np.int64(i) << (9 * (np.int64(t.level[row]) - 1)))


@helper
def _child_role(t, row):
    return (bt.U64(t.role[row]) & ~_ROLE_LEVEL) | bt.U64(np.int64(t.level[row]) - 1)


@helper
def new_child(t, m, row, i):
    """Take an empty table for entry `i` of `row`, not linked yet; returns its row, -1 if the arena is full."""
    level = np.int64(t.level[row]) - 1
    return alloc_row(t, level, child_gfn(t, row, i), _child_role(t, row), row, m.lay.nonpresent)


@helper
def split_entry(t, m, row, i):
    """Replace a huge leaf by a table of 512 leaves that inherit its bits; returns the table, -1 if the arena is full.

    No flush: every translation stays as it was.
    """
    level = np.int64(t.level[row])
    child = take_row(t, level - 1, child_gfn(t, row, i), _child_role(t, row), row)
    if child < 0:
        return child
    huge = t.sptes[row, i]
    step = bt.SHIFT_PAGE + bt.U64(9 * (level - 2))
    first = huge
    if level == 2:
        first &= ~bt.LARGE
        if m.nx:
            first = set_executable(first, m.lay, True)
    for j in range(512):
        t.sptes[bt.U64(child), j] = first + (bt.U64(j) << step)
    link(t, m, row, i, child)
    t.whole[child] = level == 2
    t.meta[SPLITS_2M if level == 2 else SPLITS_1G] += 1
    t.meta[SPTES_WRITTEN] += 513
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
    if t.level[child] == 2:
        base = t.gfn[child]
        for j in range(512):
            if base + (j + 1) * 512 > start and base + j * 512 < end:
                if split_entry(t, m, child, j) < 0:
                    return done
                done += 1
    return done


@helper
def drop_nx_mark(t, row):
    """Forget that the NX mitigation holds table `row` down, if it does."""
    if t.nx_disallowed[row] == 2:
        t.meta[NX_SPLITS] -= 1
    t.nx_disallowed[row] = 0


@helper
def _free_one(t, row):
    """Free one table, its leaves counted out; returns them."""
    level = np.int64(t.level[row])
    leaves = 512
    if not t.whole[row]:  # a table that a split has filled is not read again: recovery of 2 MiB takes 20 ns, not 470
        leaves = 0
        for i in range(512):
            leaves += is_leaf(t.sptes[row, i], level)
    if level <= 3:
        count_leaf(t, level, -leaves)
    drop_nx_mark(t, row)
    free_row(t, row)
    return leaves


@helper
def free_table(t, row):
    """Free table `row` with all below it and count its leaves out; returns the leaves dropped. The caller has unlinked it."""
    dropped = 0
    if t.level[row] > 1:
        for i in range(512):
            if not is_link(t.sptes[row, i]):
                continue
            upper = child_of(t.sptes[row, i])
            if t.level[upper] > 1:
                for j in range(512):
                    if not is_link(t.sptes[upper, j]):
                        continue
                    lower = child_of(t.sptes[upper, j])
                    if t.level[lower] > 1:
                        for k in range(512):
                            if is_link(t.sptes[lower, k]):
                                dropped += _free_one(t, child_of(t.sptes[lower, k]))
                    dropped += _free_one(t, lower)
            dropped += _free_one(t, upper)
    return dropped + _free_one(t, row)


@helper
def drop_entry(t, m, row, i):
    """Make entry `i` of `row` non-present with all below it; returns the leaves dropped."""
    spte = t.sptes[row, i]
    level = np.int64(t.level[row])
    t.sptes[row, i] = m.lay.nonpresent
    t.whole[row] = 0
    dropped = 0
    if (spte & bt.MMU_PRESENT) == bt.ZERO:
        return 0
    if level > 1 and is_link(spte):
        dropped = free_table(t, child_of(spte))
    else:
        count_leaf(t, level, -1)
        dropped = 1
    t.meta[ZAPPED] += dropped
    t.meta[SPTES_WRITTEN] += 1
    return dropped


@helper
def log_shift(t, m, row):
    """Return the place of the bit that dirty logging clears in the leaves of `row`: D, or W where D does not serve."""
    role = np.int64(t.role[row])
    if m.dirty_log_size == 0 or role & bt.ROLE_AD_DISABLED or _write_protects_l2(m, role):
        return bt.W_SHIFT
    return m.lay.dirty_shift
