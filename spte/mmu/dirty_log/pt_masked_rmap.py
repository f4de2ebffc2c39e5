"""Re-arm the dirty pages of many words by rmap alone: what a harvest of a VM without roots of the TDP MMU does."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import ctz, helper, kernel_noinline, prefetch
from spte.bits import ONE, U64, W_SHIFT, ZERO
from spte.kernels._bitmap import WORD_SHIFT, count_bits, list_pages
from spte.kernels._entries import clear_entry
from spte.mmu.dirty_log.pt_masked import rearm_in_table, rearm_rmaps
from spte.mmu.rmap import head_of

DENSE = U64(4)  # set bits a word from which sweeping 64 rmap heads and entries is quicker than a list


@helper
def _first_of_run(heads, at, mask):
    """Return the place of the entry of bit 0 if ``heads[at + b]``, b the bits of `mask`, name one SPTE each, side by side; else -1."""
    low = ctz(mask)
    place = heads[at + low] - low - 1
    other = np.int64(0)
    for b in range(U64(64)):
        other |= (heads[U64(at) + b] ^ (place + 1 + np.int64(b))) & -np.int64((mask >> b) & ONE)
    fits = place >= 0 and (place & 511) <= 512 - 64
    return place if other == 0 and fits else np.int64(-1)


@kernel_noinline
def _rearm_sparse(t, s, m, k, base, masks, first, end, pages):
    """Re-arm page by page: all heads are prefetched, then the entries that they name; one after the other a page took 79 ns, not 20."""
    changed = np.int64(0)
    count = list_pages(masks, first, end, pages, t.places)
    shift = m.lay.dirty_shift if m.dirty_log_size > 0 else W_SHIFT
    head = head_of(s, k, base, np.int64(1))
    for c in range(count):
        prefetch(s.rmaps, head + np.int64(t.places[c]))
    for c in range(count):
        ref = s.rmaps[head + np.int64(t.places[c])]
        if ref < 0:  # several SPTEs map it
            changed += rearm_rmaps(t, s, m, k, base + np.int64(t.places[c]), ONE)
        place = ref - 1 if ref > 0 else np.int64(-1)
        prefetch(t.flat, max(place, np.int64(0)))
        t.places[c] = U64(place + 1)
    for c in range(count):
        if t.places[c] != ZERO:
            changed += np.int64(clear_entry(t.flat, t.places[c] - ONE, shift, W_SHIFT, ONE, False))
    return changed


@kernel_noinline
def rearm_rmap_words(t, s, m, k, base, masks, first, end):
    """Re-arm ``masks[first:end]`` of slot `k`, word w from gfn ``base + 64 w`` on; returns SPTEs changed.

    Where 64 gfns are mapped side by side by one page, it is swept: head by head, a page took 4 ns, not 0.5.
    """
    found, pages = count_bits(masks, first, end)
    if pages < found * DENSE:
        return _rearm_sparse(t, s, m, k, base, masks, first, end, pages)
    changed = np.int64(0)
    last = s.slots[k].base_gfn + s.slots[k].npages - 64
    for w in range(U64(first), U64(end)):
        mask, gfn = masks[w], base + np.int64(w << WORD_SHIFT)
        if mask != ZERO:
            place = np.int64(-1)
            if gfn <= last:
                place = _first_of_run(s.rmaps, head_of(s, k, gfn, np.int64(1)), mask)
            if place >= 0:
                changed += rearm_in_table(t, m, place >> 9, place & 511, mask)
            else:
                changed += rearm_rmaps(t, s, m, k, gfn, mask)
    return changed
