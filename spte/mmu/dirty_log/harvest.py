"""Harvest: exchange each word of a slot's dirty bitmap with 0 and make the next write to its pages visible again.

Order is bit -> protect -> flush -> return: a write through a stale TLB entry before the flush is covered, because the page is
reported already and read after the return. The caller is exclusive on the tables, or gives `SharedTables` and is the only harvest;
it flushes if a word was not 0.
"""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import fetch_and, is_shared, load
from spte._numba.jit import helper, kernel, kernel_noinline, prefetch
from spte.arrays.tables import HARVEST_WORDS
from spte.bits import ALL_ONES, INDEX_BITS, INDEX_MASK, ONE, U64, ZERO, child_of, is_link
from spte.kernels._bitmap import WORD_SHIFT, count_bits, first_block, list_pages, next_word, take_words
from spte.kernels._entries import clear_entries, clear_entry
from spte.kernels._harvest import DENSE, IN_FLIGHT, rearm_places, rearm_window
from spte.mmu.dirty_log.pt_masked import rearm
from spte.mmu.dirty_log.pt_masked_rmap import rearm_rmap_words
from spte.mmu.tdp_mmu import log_shift
from spte.mmu.walk import leaf_table, table_at

TABLES = HARVEST_WORDS // 8 + 1  # that a block of words may meet


@kernel_noinline
def _rearm_windows(t, s, m, roots, k, base, masks, first, end):
    """Re-arm ``masks[first:end]`` of slot `k`, word w from gfn ``base + 64 w`` on, in every case; returns SPTEs changed."""
    changed = 0
    row = np.int64(-1)
    for w in range(U64(first), U64(end)):
        if masks[w] != ZERO:
            got, row = rearm(t, s, m, roots, k, base + np.int64(w << WORD_SHIFT), masks[w], row)
            changed += got
    return changed


@kernel_noinline
def _rearm_dense(t, m, root, base, masks, first, end):
    """As _rearm_windows under one root, where no word meets two tables or a writable huge leaf: 64 entries side by side at a time."""
    changed = 0
    shift = log_shift(t, m, root)
    row = np.int64(-1)
    w = next_word(masks, U64(first), U64(end))
    while w < U64(end):
        gfn = base + np.int64(w << WORD_SHIFT)
        if row < 0 or t.pages[row].gfn != gfn & ~511:
            row = leaf_table(t, root, gfn)
        place, full = row * 512 + (gfn & 511), ZERO
        while w + full < U64(end) and masks[w + full] == ALL_ONES and gfn & 511 < 512 - np.int64(full << WORD_SHIFT):
            full += ONE
        if full > ZERO:  # 64 words and their sweep as one loop: 0.2 ns a page of a small guest, word by word 0.3
            if row >= 0:
                changed += clear_entries(t.flat, place, place + np.int64(full << WORD_SHIFT), shift, shift, False, is_shared(t))
            w = next_word(masks, w + full, U64(end))
            continue
        if row >= 0:
            changed += rearm_window(t.flat, place, masks[w], shift, shift, is_shared(t))
        w = next_word(masks, w + ONE, U64(end))
    return changed


@kernel_noinline
def _rearm_sparse(t, m, root, base, masks, first, end, pages):
    """As _rearm_dense, by a list of pages made without a branch on bits; its entries are prefetched as they are re-armed.

    0.6 of a loop that counts zeros and stores at once, which waits for memory at each wrong guess, where a tenth is dirty. At a
    hundredth both wait for the same lines, five of a table: 18 ns a page in 1 TiB, prefetched by 8, 16 or 32.
    """
    shift = log_shift(t, m, root)
    count = list_pages(masks, first, end, pages, t.places)
    if pages >= TABLES:
        return _rearm_listed(t, root, base, first, end, np.int64(count), shift)
    found = ZERO
    above = table = parent = row = np.int64(-1)
    for c in range(count):
        gfn = base + np.int64(t.places[c])
        if gfn >> 9 != table:
            table = gfn >> 9
            if gfn >> 18 != above:
                above = gfn >> 18
                parent = table_at(t, root, gfn, np.int64(2))
            row = _child(t, parent, table)
        place = row * 512 + (gfn & 511)
        if found < IN_FLIGHT:
            prefetch(t.flat, place)
        t.places[found] = U64(place)
        found += U64(row >= 0)
    return rearm_places(t.flat, t.places, found, shift, shift, is_shared(t))


@helper
def _child(t, parent, table):
    """Return the row that entry `table` modulo 512 of level-2 table `parent` links to, -1 if there is none."""
    spte = t.sptes[parent, table & 511] if parent >= 0 else ZERO
    return child_of(spte) if is_link(spte) else np.int64(-1)


@kernel_noinline
def _rearm_listed(t, root, base, first, end, count, shift):
    """Re-arm the pages ``t.places[:count]`` of the block, whose tables are listed first: no branch on where one ends."""
    rows, table0 = t.places[t.places.shape[0] - TABLES - 1 :], (base + (first << 6)) >> 9
    parent = np.int64(-1)
    for table in range(table0, ((base + (end << 6) - 1) >> 9) + 1):
        if table == table0 or table & 511 == 0:
            parent = table_at(t, root, table << 9, np.int64(2))
        rows[table - table0] = U64(_child(t, parent, table) + 1)
    done = ZERO
    for c in range(U64(count)):
        prefetch(t.flat, np.int64(_listed(rows, base, table0, t.places[min(c + IN_FLIGHT, U64(count) - ONE)])[0]))
        place, is_there = _listed(rows, base, table0, t.places[c])
        done += clear_entry(t.flat, place, shift, shift, is_there, is_shared(t))
    return np.int64(done)


@helper
def _listed(rows, base, table0, page):
    """Return the place of the entry of a page of the slot, and 1 if there is one."""
    gfn = U64(base) + page
    row = rows[(gfn >> INDEX_BITS) - U64(table0)]
    is_there = U64(row != ZERO)
    return ((row - is_there) << INDEX_BITS) | (gfn & INDEX_MASK), is_there


@helper
def _rearm(t, s, m, roots, k, base, masks, first, end):
    """Re-arm ``masks[first:end]`` of slot `k`; returns ``(words not 0, SPTEs changed)``."""
    found, pages = count_bits(masks, first, end)
    changed = 0
    if s.slots[k].rmap[0] >= 0 and roots.shape[0] == 0 and not m.clear_arms_huge:
        changed = rearm_rmap_words(t, s, m, k, base, masks, first, end)
    elif m.clear_arms_huge or base & 63 or s.slots[k].rmap[0] >= 0:
        changed = _rearm_windows(t, s, m, roots, k, base, masks, first, end)
    elif pages >= found * U64(DENSE):
        for r in range(roots.shape[0]):
            changed += _rearm_dense(t, m, roots[r], base, masks, first, end)
    else:
        for r in range(roots.shape[0]):
            changed += _rearm_sparse(t, m, roots[r], base, masks, first, end, pages)
    return np.int64(found), changed


@kernel
def get_dirty_log(t, s, mode, roots, k, out):
    """Move the live bitmap of slot `k` to `out`, all 0 before, and re-arm what was set: KVM's kvm_get_dirty_log_protect.

    Returns ``(words not 0, SPTEs changed)``.
    """
    m = mode[0]
    live = U64(s.slots[k].dirty_bitmap)
    found, changed = 0, 0
    first = np.int64(0)
    while True:
        first = first_block(s.words, live, first, out.shape[0])
        if first >= out.shape[0]:
            return found, changed
        end = min(first + HARVEST_WORDS, out.shape[0])
        take_words(s.words, live, out, first, end, is_shared(t))
        some, got = _rearm(t, s, m, roots, k, s.slots[k].base_gfn, out, first, end)
        found += some
        changed += got
        first = end


@helper
def _take_bits(t, words, w, wanted):
    """Return word `w`; beside vCPUs its bits in `wanted` are cleared at once: KVM's atomic_long_fetch_andnot."""
    if not is_shared(t):
        return words[w]
    if (load(words, np.int64(w)) & wanted) == ZERO:
        return ZERO
    return fetch_and(words, np.int64(w), ~wanted)


@kernel
def clear_dirty_log(t, s, mode, roots, k, first_word, wanted):
    """Clear the bits of `wanted` from `first_word` of slot `k` on and re-arm those that were set: KVM's kvm_clear_dirty_log_protect.

    They stay in `wanted`. Returns ``(words not 0, SPTEs changed)``.
    """
    m = mode[0]
    live = U64(s.slots[k].dirty_bitmap + first_word)
    base = s.slots[k].base_gfn + (first_word << 6)
    found, changed = 0, 0
    for first in range(0, wanted.shape[0], HARVEST_WORDS):
        end = min(first + HARVEST_WORDS, wanted.shape[0])
        seen = ZERO
        for w in range(U64(first), U64(end)):
            mask = wanted[w] & _take_bits(t, s.words, live + w, wanted[w])
            wanted[w] = mask
            seen |= mask
        if seen == ZERO:
            continue
        if not is_shared(t):
            for w in range(U64(first), U64(end)):
                s.words[live + w] &= ~wanted[w]
        some, got = _rearm(t, s, m, roots, k, base, wanted, first, end)
        found += some
        changed += got
    return found, changed


@kernel
def get_dirty_log_shared(t, s, mode, roots, k, out):
    """As `get_dirty_log`, with `SharedTables`, beside vCPUs."""
    return get_dirty_log(t, s, mode, roots, k, out)


@kernel
def clear_dirty_log_shared(t, s, mode, roots, k, first_word, wanted):
    """As `clear_dirty_log`, with `SharedTables`, beside vCPUs."""
    return clear_dirty_log(t, s, mode, roots, k, first_word, wanted)
