"""Accesses of a batch walked together, ahead of their turn: the entries they meet, and what faults read, come from memory at once."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import compare_exchange, is_shared, load
from spte._numba.jit import helper, kernel_noinline, prefetch
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.arrays.vcpu import CONFIRMED, EXEC, NEEDBREAK, REQUEST, STAMP, STAMP_STEP, WALKS_AHEAD, WRITE
from spte.bits import INDEX_BITS, INDEX_MASK, MMU_PRESENT, SHIFT_PAGE, TYPE_DISABLED, TYPE_MASK, U64, WRITABLE, ZERO
from spte.mmu.walk import place_above, place_of

# Zen 5, 1 TiB: a write takes 6.0 ns by 64, 7.0 by 32, 9.3 by 16. Other CPUs lose some of 32 on their way: 36 ns a logged write, not 29.
AHEAD = np.int64(WALKS_AHEAD)
ONE_BY_ONE = 64  # accesses done one by one after a block that got nowhere, as faults come in clusters
# Lines of clustered faults are prefetched for 16 faults at a time, 32 accesses ahead: 86 ns each in 1 TiB; 108 without the level-2
# entries of the next 16, 200 without prefetch. 8 at a time took 1.7 times as long, 32 at a time 1.2.
PREFETCH_BLOCK, PREFETCH_BEFORE = 16, np.int64(32)
NEAR = np.int64(1024)  # gfns: closer accesses are in the caches anyway, and prefetching cost a fifth of a fast fault
ROW_ONE = U64(512)


@helper
def _asks(m, kind):
    """Return for accesses of `kind`: the bits hardware looks at, what they are where it lets them through, the bits that it sets."""
    lay = m.lay
    accessed, dirty = (lay.accessed, lay.dirty) if m.hw_ad else (ZERO, ZERO)
    if kind == WRITE:
        return MMU_PRESENT | WRITABLE, MMU_PRESENT | WRITABLE, accessed | dirty
    if kind == EXEC:
        return MMU_PRESENT | lay.x | lay.nx, MMU_PRESENT | lay.x, accessed
    return MMU_PRESENT | lay.readable, MMU_PRESENT | lay.readable, accessed


@kernel_noinline
def _look_up(flat, leaf_rows, listed, gfns, first, end, places):
    """Put the places of the level-1 entries of ``gfns[first:end]`` into `places` and prefetch them; returns the lowest."""
    lowest, last = ~ZERO, U64(listed)
    for j in range(U64(first), U64(end)):
        gfn = U64(gfns[j])
        place = (U64(leaf_rows[min(gfn >> INDEX_BITS, last)]) << INDEX_BITS) | (gfn & INDEX_MASK)
        lowest = min(lowest, place)
        prefetch(flat, np.int64(place))
        places[j - U64(first)] = place
    return lowest


@kernel_noinline
def _walk_rest(t, root, gfns, first, end, places):
    """Put the places where the walks of ``gfns[first:end]`` end into `places` and prefetch them, where there is none beyond row 0."""
    for j in range(U64(first), U64(end)):
        if places[j - U64(first)] < ROW_ONE:
            place, _ = place_of(t, root, gfns[j])
            prefetch(t.flat, np.int64(place))
            places[j - U64(first)] = place


@kernel_noinline
def _let_through(flat, gfns, first, end, places, looks, permission, sets, logs, pml, index, words, first_bit):
    """Do accesses of one kind, whose walks ended at `places`, up to the first that exits; returns that one and the PML index."""
    care, want = looks | sets, permission | sets
    for j in range(U64(first), U64(end)):
        place = places[j - U64(first)]
        spte = flat[place]  # at any level: a walk ends at no link, and what is present and no link is a leaf
        if (spte & care) != want:
            if (spte & looks) != permission or (logs != ZERO and index > 511):
                return np.int64(j), index
            if (spte & TYPE_MASK) != TYPE_DISABLED:
                if (sets & ~spte & logs) != ZERO:
                    pml[U64(index)] = U64(gfns[j]) << SHIFT_PAGE
                    prefetch(words, (gfns[j] + first_bit) >> 6)  # for the drain: a logged write in 1 TiB takes 29 ns, else 35
                    index = (index - 1) & 0xFFFF
                flat[place] = spte | sets
    return end, index


@kernel_noinline
def _let_through_shared(flat, gfns, first, end, places, looks, permission, sets, logs, v, writes, index, words, first_bit):
    """As _let_through, beside others: A and D are set by compare-and-exchange; who finds the entry changed stops before the access.

    Where memory is kept, each of `writes` stores its stamp, all after the last look at an SPTE, as a CPU may with what its TLB holds.
    """
    care, want = looks | sets, permission | sets
    stop = np.int64(end)
    for j in range(U64(first), U64(end)):
        place = np.int64(places[j - U64(first)])
        spte = load(flat, place)
        if (spte & care) != want:
            changes = (spte & TYPE_MASK) != TYPE_DISABLED
            refused = (spte & looks) != permission or (logs != ZERO and index > 511)
            if refused or (changes and compare_exchange(flat, place, spte, spte | sets) != spte):
                stop = np.int64(j)
                break
            if changes and (sets & ~spte & logs) != ZERO:
                v.pml[U64(index)] = U64(gfns[j]) << SHIFT_PAGE
                prefetch(words, (gfns[j] + first_bit) >> 6)
                index = (index - 1) & 0xFFFF
    if writes and v.memory.shape[0] > 0:
        for j in range(U64(first), U64(stop)):
            v.requests[STAMP] += STAMP_STEP
            v.memory[gfns[j]] = U64(v.requests[STAMP])
    return stop, index


@helper
def is_kicked(v):
    """Tell whether another thread wants the vCPU to exit: kvm_request_pending, once for all."""
    return load(v.requests, REQUEST) != v.requests[CONFIRMED] or load(v.requests, NEEDBREAK) != 0


@helper
def _alike(kinds, at, end):
    """Return the first access after `at`, at most `end`, of another kind."""
    if kinds.shape[0] == 1:
        return end
    same = at + 1
    while same < end and kinds[same] == kinds[at]:
        same += 1
    return same


@kernel_noinline
def run_ahead(t, s, v, m, gfns, kinds, at, end, listed):
    """Let hardware do accesses ``[at, end)`` up to the first that exits; returns that one's place in the batch, else `end`.

    A block's entries are prefetched for while those of the block before arrive. Beside others it ends after a block when kicked.
    """
    vcpu = v.vcpu[0]
    root, index = vcpu.root, vcpu.pml_index
    logs = m.lay.dirty if vcpu.pml_enabled else ZERO
    first_bit = s.slots[s.memslots[0].last_used_slot].dirty_bitmap * 64 - s.slots[s.memslots[0].last_used_slot].base_gfn
    half, stop, after = np.int64(0), at, min(at + AHEAD, end)
    exits = False
    while at < end and not exits:
        # Short loops of their own, so that many looked-up rows are on their way at once: 1.3 times a bare scatter, in one loop 1.7.
        if _look_up(t.flat, t.leaf_rows, listed, gfns, stop, after, v.walked[AHEAD - half :]) < ROW_ONE:
            _walk_rest(t, root, gfns, stop, after, v.walked[AHEAD - half :])
        begin = at
        while at < stop and not exits:
            same = _alike(kinds, at, stop)
            kind = np.int64(kinds[at if kinds.shape[0] > 1 else 0])
            looks, permission, sets = _asks(m, kind)
            places = v.walked[half + at - begin :]
            if is_shared(t):
                at, index = _let_through_shared(
                    t.flat, gfns, at, same, places, looks, permission, sets, logs, v, kind == WRITE, index, s.words, first_bit
                )
            else:
                at, index = _let_through(t.flat, gfns, at, same, places, looks, permission, sets, logs, v.pml, index, s.words, first_bit)
            exits = at != same
        if is_shared(t):
            exits = exits or is_kicked(v)
        half, stop, after = AHEAD - half, after, min(after + AHEAD, end)
    vcpu.pml_entries += (vcpu.pml_index - index) & 0xFFFF
    vcpu.pml_index = index
    return at


@kernel_noinline
def prefetch_for_faults(t, s, h, root, gfns, first, end):
    """Prefetch what faults of ``gfns[first:end]`` will read: entry, role, host block, bitmap or lpage counter, rmap.

    Also the level-2 entries of as many accesses after those.
    """
    k = s.memslots[0].last_used_slot
    base, npages, logs = s.slots[k].base_gfn, U64(s.slots[k].npages), s.slots[k].flags & LOG_DIRTY_PAGES
    word, hpage, lpage, rmap = s.slots[k].dirty_bitmap, s.slots[k].hpage, s.slots[k].lpage_info[0], s.slots[k].rmap[0]
    for j in range(U64(end), U64(min(end + end - first, gfns.shape[0]))):
        place, _ = place_above(t, root, gfns[j])
        prefetch(t.flat, np.int64(place))
    for j in range(U64(first), U64(end)):
        place, _ = place_of(t, root, gfns[j])
        prefetch(t.flat, np.int64(place))
        prefetch(t.pages, np.int64(place >> INDEX_BITS))
        offset = gfns[j] - base
        if U64(offset) < npages:
            prefetch(h.blocks, (hpage + offset) >> 9)
            if logs:
                prefetch(s.words, word + (offset >> 6))
            else:
                prefetch(s.disallow_lpage, lpage + (offset >> 9))
            if rmap >= 0:
                prefetch(s.rmaps, rmap + offset)
