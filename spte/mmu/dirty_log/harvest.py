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
from spte.bits import ONE, U64, ZERO
from spte.kernels._bitmap import WORD_SHIFT, count_bits, first_block, list_pages, next_word, take_words
from spte.kernels._harvest import DENSE, IN_FLIGHT, rearm_places, rearm_window
from spte.mmu.dirty_log.pt_masked import rearm
from spte.mmu.dirty_log.pt_masked_rmap import rearm_rmap_words
from spte.mmu.tdp_mmu import log_shift
from spte.mmu.walk import leaf_table


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
        if row >= 0:
            changed += rearm_window(t.flat, row * 512 + (gfn & 511), masks[w], shift, shift, is_shared(t))
        w = next_word(masks, w + ONE, U64(end))
    return changed


@kernel_noinline
def _rearm_sparse(t, m, root, base, masks, first, end):
    """As _rearm_dense, by a list of pages made without a branch on bits; its entries are prefetched as they are re-armed.

    0.6 of a loop that counts zeros and stores at once, which waits for memory at each wrong guess, where a tenth is dirty. At a
    hundredth both wait for the same lines, five of a table: 18 ns a page in 1 TiB, prefetched by 8, 16 or 32.
    """
    found = ZERO
    count = list_pages(masks, first, end, t.places)
    table, row = np.int64(-1), np.int64(-1)
    for c in range(count):
        gfn = base + np.int64(t.places[c])
        if gfn >> 9 != table:
            table = gfn >> 9
            row = leaf_table(t, root, gfn)
        place = row * 512 + (gfn & 511)
        if found < IN_FLIGHT:
            prefetch(t.flat, place)
        t.places[found] = U64(place)
        found += U64(row >= 0)
    shift = log_shift(t, m, root)
    return rearm_places(t.flat, t.places, found, shift, shift, is_shared(t))


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
            changed += _rearm_sparse(t, m, roots[r], base, masks, first, end)
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
