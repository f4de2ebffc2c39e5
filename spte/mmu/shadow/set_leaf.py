"""Leaves of the shadow MMU put in place: by a fault, early beside one, and anew where the guest's tables refuse an address."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.arrays.vcpu import EV_SET
from spte.bits import ACC_EXEC, ACC_WRITE, MMU_PRESENT, PFN_MASK, ROLE_ACCESS_SHIFT, SHIFT_PAGE, U64, WRITABLE, ZERO, is_link
from spte.host.pages import writable_now
from spte.mmu.arena import count_leaf
from spte.mmu.make_spte import make_leaf
from spte.mmu.mark_dirty import mark_dirty, note
from spte.mmu.memslot import find_slot
from spte.mmu.page_fault import HostPage
from spte.mmu.page_track import may_write
from spte.mmu.rmap import rmap_add
from spte.mmu.shadow.page import drop_entry_of, drop_leaf, entry_access, entry_gfn, set_shadowed, unlink_page
from spte.mmu.shadow.sync import clean_access, gpte_access, gpte_gfn, may_map_early, needs_flush, read_gpte, sync_entry
from spte.mmu.walk import walk

PREFETCH = 8  # SPTEs of the aligned group that a fault fills


@helper
def set_leaf(t, s, v, m, k, row, i, gfn, page, access, prefetch):
    """Put the leaf of `gfn` of slot `k` at entry `i` of `row`: mmu_set_spte; returns whether it changed, and whether W was refused."""
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    old = t.sptes[row, i]
    flush = False
    mapped = False
    if (old & MMU_PRESENT) != ZERO:
        if level > 1 and is_link(old):  # the page below stays in the hash, with what it maps
            unlink_page(t, s, m, row, i)
            flush = True
        elif ((old & PFN_MASK) >> SHIFT_PAGE) != page.pfn:
            drop_leaf(t, s, m, row, i)
            flush = True
        else:
            if prefetch and m.prefault_leaves:
                return False, False
            mapped = True
    old = t.sptes[row, i]
    wants = page.map_writable and access & ACC_WRITE != 0
    write = wants and ((old & WRITABLE) != ZERO or may_write(t, gfn, True, prefetch))
    allowed = access & ~ACC_EXEC if m.nx and level > 1 else access
    new = make_leaf(m, level, page.pfn, old, prefetch, page.map_writable, np.int64(t.pages[row].role), allowed, write)
    if (new & WRITABLE) != ZERO and s.slots[k].flags & LOG_DIRTY_PAGES:
        mark_dirty(t, s, v, k, gfn)
    # An entry that keeps its pfn stays in the rmap where it is: only what the guest allows is new.
    set_shadowed(t, row, i, entry_gfn(t, row, i) if mapped else gfn, access)
    if new == old:
        return False, wants and not write
    t.sptes[row, i] = new
    kvm.sptes_written += 1
    kvm.remote_tlb_flush_requests += flush or (mapped and needs_flush(m, old, new))
    if not mapped:
        rmap_add(s, k, gfn, level, row * 512 + i)
        count_leaf(t, level, 1)
    if v.log.shape[0] > 0:
        note(v, EV_SET, gfn, level, new, 0, 0)
    return True, wants and not write


@helper
def _prefetch_run(t, s, h, v, m, row, first, end):
    """Fill the empty entries ``[first, end)`` of `row` while the host has a writable page at once; False ends all prefetch."""
    gfn = entry_gfn(t, row, first)
    k = find_slot(s, gfn)
    access = entry_access(t, row, first)
    if k < 0 or s.slots[k].flags & READONLY or (access & ACC_WRITE and s.slots[k].flags & LOG_DIRTY_PAGES):
        return False
    if gfn + (end - first) > s.slots[k].base_gfn + s.slots[k].npages:
        return False
    hpage = s.slots[k].hpage + gfn - s.slots[k].base_gfn
    if not writable_now(h, hpage):
        return False
    for i in range(first, end):
        if not writable_now(h, hpage + i - first):
            break
        set_leaf(t, s, v, m, k, row, i, gfn + i - first, HostPage(U64(hpage + i - first), True, np.int64(1)), access, True)
    return True


@helper
def prefetch_direct(t, s, h, v, m, row, at):
    """Map the other pages of the aligned group of 8 before they are asked for; leaves not accessed yet."""
    base = at & ~(PREFETCH - 1)
    first = np.int64(-1)
    for i in range(base, base + PREFETCH):
        if (t.sptes[row, i] & MMU_PRESENT) != ZERO or i == at:
            if first >= 0 and not _prefetch_run(t, s, h, v, m, row, first, i):
                return
            first = np.int64(-1)
        elif first < 0:
            first = np.int64(i)
    if first >= 0 and m.prefetch_tail:
        _prefetch_run(t, s, h, v, m, row, first, base + PREFETCH)


@helper
def prefetch_shadowed(t, s, h, v, m, row, at):
    """Do the same below a guest table, as far as its entries are accessed and the host has writable pages at once."""
    base = at & ~(PREFETCH - 1)
    for i in range(base, base + PREFETCH):
        if i == at or (t.sptes[row, i] & MMU_PRESENT) != ZERO:
            continue
        gpte = read_gpte(s, h, t.pages[row].gfn, i)
        if not may_map_early(m, gpte):
            return
        gfn = gpte_gfn(gpte)
        access = clean_access(m, gpte, gpte_access(m, gpte) & (np.int64(t.pages[row].role) >> ROLE_ACCESS_SHIFT))
        set_shadowed(t, row, i, gfn, access)
        if not _prefetch_run(t, s, h, v, m, row, np.int64(i), np.int64(i) + 1):
            return


@kernel_noinline
def invalidate_address(t, s, h, v, m, address):
    """Bring the entry of `address`, which the guest's tables refuse, in step if its page is unsync: a TLB forgets it too."""
    kvm = t.kvm[0]
    row, i, level = walk(t, v.vcpu[0].root, address)
    if level > 1 or not t.pages[row].unsync:
        return
    if not m.sync_remakes:
        kvm.remote_tlb_flush_requests += t.sptes[row, i] != m.lay.nonpresent and sync_entry(t, s, h, v, m, row, i)
        return
    kvm.remote_tlb_flush_requests += (t.sptes[row, i] & MMU_PRESENT) != ZERO
    drop_entry_of(t, s, m, row, i)
    gpte = read_gpte(s, h, t.pages[row].gfn, i)
    gfn = gpte_gfn(gpte)
    k = find_slot(s, gfn)
    if not may_map_early(m, gpte) or k < 0 or s.slots[k].flags & READONLY:
        return
    hpage = s.slots[k].hpage + gfn - s.slots[k].base_gfn
    if writable_now(h, hpage):
        access = clean_access(m, gpte, gpte_access(m, gpte) & (np.int64(t.pages[row].role) >> ROLE_ACCESS_SHIFT))
        set_leaf(t, s, v, m, k, row, i, gfn, HostPage(U64(hpage), True, np.int64(1)), access, True)
