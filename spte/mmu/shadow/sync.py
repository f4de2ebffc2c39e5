"""Bringing pages in step with the guest tables that they shadow, and finding or making such pages."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.slots import LOG_DIRTY_PAGES
from spte.bits import ACC_EXEC, ACC_USER, ACC_WRITE, MMU_PRESENT, PFN_MASK, SHIFT_PAGE, WRITABLE, ZERO
from spte.host.guest_memory import read_word
from spte.mmu.make_spte import make_leaf
from spte.mmu.mark_dirty import mark_dirty
from spte.mmu.memslot import find_slot
from spte.mmu.page_track import may_write, protect_gfn, set_synced, unsync_below
from spte.mmu.shadow.page import drop_leaf, entry_access, entry_gfn, find_page, new_page, set_shadowed

BATCH = 15  # unsync pages, and pages on the way to them from the root, that are gone through together


@helper
def read_gpte(s, h, gfn, i):
    """Return entry `i` of the guest table at `gfn`, 0 if no slot holds it."""
    k = find_slot(s, gfn)
    if k < 0:
        return ZERO
    return read_word(h, s.slots[k].hpage + gfn - s.slots[k].base_gfn, i)


@helper
def gpte_access(m, gpte):
    """Return what a guest-table entry allows."""
    access = ACC_WRITE if (gpte & WRITABLE) != ZERO else 0
    if (gpte & (m.gpte.x | m.gpte.nx)) == m.gpte.x:
        access |= ACC_EXEC
    if (gpte & m.gpte.user) != ZERO:
        access |= ACC_USER
    return np.int64(access)


@helper
def gpte_gfn(gpte):
    """Return the frame of a guest-table entry."""
    return np.int64((gpte & PFN_MASK) >> SHIFT_PAGE)


@helper
def may_map_early(m, gpte):
    """Tell whether a level-1 guest entry may be mapped before it is asked for: present and, where that is kept, accessed."""
    return (gpte & m.gpte.present) != ZERO and (gpte & m.gpte.accessed) == m.gpte.accessed


@helper
def clean_access(m, gpte, access):
    """Return `access` without writing if the guest has not set D yet: its first write must be seen."""
    return access & ~ACC_WRITE if (gpte & m.gpte.dirty) != m.gpte.dirty else access


@helper
def needs_flush(m, old, new):
    """Tell whether a leaf that changes from `old` to `new` needs a flush: it loses what a TLB may hold."""
    if (old & MMU_PRESENT) == ZERO:
        return False
    lost_w = (old & m.lay.mmu_writable) != ZERO and (new & WRITABLE) == ZERO
    return lost_w or (old & ~new & (m.lay.accessed | m.lay.dirty)) != ZERO


@helper
def sync_entry(t, s, h, v, m, row, i):
    """Bring one entry of a level-1 page in step with the guest's; returns whether the caller must flush."""
    spte = t.sptes[row, i]
    gpte = read_gpte(s, h, t.pages[row].gfn, i)
    present = (spte & MMU_PRESENT) != ZERO
    if not may_map_early(m, gpte):
        if present:
            drop_leaf(t, s, m, row, i)
        else:
            t.sptes[row, i] = m.lay.nonpresent
        return True
    gfn = gpte_gfn(gpte)
    if not present:  # an MMIO SPTE, which stays that of the same gfn
        if gfn != entry_gfn(t, row, i):
            t.sptes[row, i] = m.lay.nonpresent
        return False
    role = np.int64(t.pages[row].role)
    access = clean_access(m, gpte, gpte_access(m, gpte) & (role >> 8))
    if gfn != entry_gfn(t, row, i) or (access == 0 and (m.lay.present & m.lay.readable) == ZERO):
        drop_leaf(t, s, m, row, i)
        return True
    if access == entry_access(t, row, i) and not m.sync_remakes:
        return False
    set_shadowed(t, row, i, gfn, access)
    host_writable = (spte & m.lay.host_writable) != ZERO
    write = host_writable and access & ACC_WRITE != 0
    if write and (spte & WRITABLE) == ZERO:
        write = may_write(t, gfn, False, True)
    k = find_slot(s, gfn)
    pfn = (spte & PFN_MASK) >> SHIFT_PAGE
    new = make_leaf(m, np.int64(1), pfn, spte, m.sync_accessed == 0, host_writable, role, access, write)
    if (spte & WRITABLE) != ZERO and not m.dirty_on_sync:
        new &= ~m.lay.dirty
    if (new & WRITABLE) != ZERO and s.slots[k].flags & LOG_DIRTY_PAGES:
        mark_dirty(t, s, v, k, gfn)
    t.sptes[row, i] = new
    t.kvm[0].sptes_written += 1
    return needs_flush(m, spte, new)


@kernel_noinline
def sync_page(t, s, h, v, m, row):
    """Bring every entry of a level-1 page in step with the guest's; returns whether the caller must flush."""
    flush = False
    for i in range(512):
        if t.sptes[row, i] != m.lay.nonpresent and sync_entry(t, s, h, v, m, row, np.int64(i)):
            flush = True
    return flush


@kernel_noinline
def sync_children(t, s, h, v, m, root):
    """Bring every unsync page below `root` in step and write-protect its table, with the flushes that this needs.

    A flush for tables that are protected serves what was synced before them too.
    """
    kvm = t.kvm[0]
    flush = False
    while kvm.mmu_unsync > 0:
        count = unsync_below(t, root, 0, BATCH, True)
        if count == 0:
            break
        protected = False
        for n in range(count):
            if protect_gfn(t, s, m, t.pages[t.doomed[n]].gfn):
                protected = True
        kvm.remote_tlb_flush_requests += protected
        flush = flush and not protected
        for n in range(count):
            set_synced(t, t.doomed[n])
            if sync_page(t, s, h, v, m, np.int64(t.doomed[n])):
                flush = True
    kvm.remote_tlb_flush_requests += flush


@kernel_noinline
def get_page(t, s, h, v, m, gfn, level, role):
    """Return the shadow page of `gfn` with `role`, a new one if there is none; -1 if the arena is full."""
    row = find_page(t, s, m, gfn, level, role)
    if row < 0:
        return new_page(t, s, m, gfn, level, role)
    # An unsync page is brought in step and stays unsync: its table is protected only when the guest flushes.
    if t.pages[row].unsync and sync_page(t, s, h, v, m, row):
        t.kvm[0].remote_tlb_flush_requests += 1
    t.pages[row].write_flooding_count = 0
    return row
