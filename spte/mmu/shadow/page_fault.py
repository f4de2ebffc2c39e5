"""The shadow MMU's fault path: direct roots, and roots that shadow a guest's tables; leaves in rmaps, neighbours prefetched."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_apart
from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.arrays.vcpu import DONE, EMULATED, EV_SET, EXEC, EXIT_GUEST_FAULT, EXIT_GUEST_PML_FULL, EXIT_MMIO, EXIT_NOMEM, WRITE
from spte.bits import (
    ACC_EXEC,
    ACC_WRITE,
    MMU_PRESENT,
    PFN_MASK,
    ROLE_ACCESS,
    ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED,
    ROLE_IS_DIRECT,
    ROLE_LEVEL,
    SHIFT_PAGE,
    U64,
    WRITABLE,
    ZERO,
    child_of,
    is_link,
)
from spte.host.pages import writable_now
from spte.mmu.arena import count_leaf
from spte.mmu.make_spte import make_leaf
from spte.mmu.mark_dirty import mark_dirty, note
from spte.mmu.memslot import find_slot
from spte.mmu.page_fault import begin_fault, fast_fault, fault_page, map_gfn, mmio_spte, nx_holds, nx_mark_of
from spte.mmu.page_track import is_direct, is_tracked, may_write
from spte.mmu.rmap import rmap_add
from spte.mmu.shadow.emulate import emulate_write
from spte.mmu.shadow.guest_walk import WALK_OK, WALK_PML_FULL, walk_guest
from spte.mmu.shadow.page import drop_leaf, entry_access, entry_gfn, link_page, set_shadowed, unlink_page
from spte.mmu.shadow.sync import clean_access, get_page, gpte_access, gpte_gfn, may_map_early, needs_flush, read_gpte, sync_children
from spte.mmu.walk import index_of

PREFETCH = 8  # SPTEs of the aligned group that a fault fills


@helper
def _next_page(t, s, h, v, m, row, i, gfn, direct, access):
    """Return the page below entry `i` of `row`, found or made and linked, and whether it was not linked before; -1: arena full.

    A huge leaf there is dropped with a flush. A page that shadows a guest table is in step with it before it is linked.
    """
    old = t.sptes[row, i]
    if is_link(old):
        return child_of(old), False
    level = np.int64(t.pages[row].level) - 1
    role = (np.int64(t.pages[row].role) & ~(ROLE_LEVEL | ROLE_IS_DIRECT | ROLE_ACCESS)) | level | (access << ROLE_ACCESS_SHIFT)
    child = get_page(t, s, h, v, m, gfn, level, role | ROLE_IS_DIRECT if direct else role)
    if child < 0:
        return child, False
    if not direct and level > 1:
        sync_children(t, s, h, v, m, child)
    if (t.sptes[row, i] & MMU_PRESENT) != ZERO:
        drop_leaf(t, s, m, row, i)
        t.kvm[0].remote_tlb_flush_requests += 1
    link_page(t, s, m, row, i, child)
    return child, True


@helper
def set_leaf(t, s, v, m, k, row, i, gfn, pfn, host_writable, access, prefetch):
    """Put the leaf of `gfn` at entry `i` of `row`; returns whether the entry changed, and whether W was refused."""
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    old = t.sptes[row, i]
    flush = False
    mapped = False
    if (old & MMU_PRESENT) != ZERO:
        if level > 1 and is_link(old):  # the page below stays in the hash, with what it maps
            unlink_page(t, s, m, row, i)
            flush = True
        elif ((old & PFN_MASK) >> SHIFT_PAGE) != pfn:
            drop_leaf(t, s, m, row, i)
            flush = True
        else:
            mapped = True
    old = t.sptes[row, i]
    wants = host_writable and access & ACC_WRITE != 0
    write = wants and ((old & WRITABLE) != ZERO or may_write(t, gfn, True, prefetch))
    allowed = access & ~ACC_EXEC if m.nx and level > 1 else access
    new = make_leaf(m, level, pfn, old, prefetch, host_writable, np.int64(t.pages[row].role), allowed, write)
    if write and s.slots[k].flags & LOG_DIRTY_PAGES:
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
        set_leaf(t, s, v, m, k, row, i, gfn + i - first, U64(hpage + i - first), True, access, True)
    return True


@helper
def _prefetch_direct(t, s, h, v, m, row, at):
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
    if first >= 0:
        _prefetch_run(t, s, h, v, m, row, first, base + PREFETCH)


@helper
def _prefetch_shadowed(t, s, h, v, m, row, at):
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


@helper
def _finish(t, s, h, v, m, k, row, i, gfn, pfn, host_writable, access, kind, prefetch):
    """Put the leaf that a fault is after, or an MMIO SPTE where no slot is; returns an exit reason."""
    vcpu = v.vcpu[0]
    level = np.int64(t.pages[row].level)
    if k < 0:
        if (t.sptes[row, i] & MMU_PRESENT) != ZERO:
            drop_leaf(t, s, m, row, i)
        set_shadowed(t, row, i, gfn, access)
        t.sptes[row, i] = mmio_spte(m, s, gfn)
        t.kvm[0].sptes_written += 1
        vcpu.pf_emulate += not prefetch
        vcpu.pf_mmio_spte_created += 1
        return EXIT_MMIO
    first = U64(pfn) & ~((U64(1) << U64(9 * (level - 1))) - U64(1))
    start = gfn & -(np.int64(1) << (9 * (level - 1)))
    changed, refused = set_leaf(t, s, v, m, k, row, i, gfn if level == 1 else start, first, host_writable, access, prefetch)
    reason = EMULATED if refused and kind == WRITE else DONE
    if reason == DONE:
        vcpu.pf_fixed += changed and not prefetch
        vcpu.pf_spurious += not (changed or prefetch)
    return reason


@helper
def shadow_map_gfn(t, s, h, v, m, k, gfn, kind, prefetch):
    """Take the slow path for a direct root. Returns an exit reason: DONE if the leaf is there, EMULATED as `map_gfn`."""
    reason, pfn, host_writable, fits = fault_page(s, h, m, k, gfn, kind)
    if reason != DONE:
        return reason
    no_huge = m.nx and kind == EXEC
    row = v.vcpu[0].root
    access = np.int64(7)
    goal = np.int64(1) if no_huge else min(fits, np.int64(t.pages[row].level) - 1)  # a PAE root has no leaves
    row, i = _descend(t, s, h, v, m, row, gfn, gfn, goal, fits, no_huge, access)
    if row < 0:
        return EXIT_NOMEM
    reason = _finish(t, s, h, v, m, k, row, i, gfn, pfn, host_writable, access, kind, prefetch)
    if reason != EXIT_MMIO and not np.int64(t.pages[row].role) & ROLE_AD_DISABLED and t.pages[row].level == 1:
        _prefetch_direct(t, s, h, v, m, row, i)
    return reason


@kernel_apart
def direct_map_gfn(t, s, h, v, m, k, gfn, kind, prefetch, row, i, level):
    """As `map_gfn`, compiled once for all that the TDP MMU's own loop does not serve."""
    return map_gfn(t, s, h, v, m, k, gfn, kind, prefetch, row, i, level)


@helper
def _descend(t, s, h, v, m, row, address, gfn, goal, fits, no_huge, access):
    """Go down from `row` to `goal` over direct pages; returns row (-1: arena full) and index. `address` finds the entries."""
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    i = index_of(address, level)
    while True:
        if level == goal and nx_holds(t, m, t.sptes[row, i], level):
            goal -= 1
        if level == goal:
            return row, i
        first = gfn & -(np.int64(1) << (9 * (level - 1)))
        old = t.sptes[row, i]
        if is_link(old) and (np.int64(t.pages[child_of(old)].role) & ROLE_ACCESS) >> ROLE_ACCESS_SHIFT != access:
            unlink_page(t, s, m, row, i)  # what the guest allows has changed
            kvm.remote_tlb_flush_requests += 1
        nx_mark = nx_mark_of(m, level, fits) if no_huge else 0
        child, fresh = _next_page(t, s, h, v, m, row, i, first, True, access)
        if child < 0:
            return child, i
        if fresh and nx_mark and t.pages[child].nx_huge_page_disallowed == 0:
            t.pages[child].nx_huge_page_disallowed = nx_mark
            kvm.nx_lpage_splits += nx_mark == 2
        row = child
        level -= 1
        i = index_of(address, level)


@kernel_apart
def _guest_fault(t, s, h, v, m, address, kind, present, again):
    """Take the slow path for a root that shadows the guest's tables; `address` is a page number of theirs.

    Returns an exit reason: DONE if the leaf is there; EXIT_GUEST_FAULT if the guest's tables do not allow the access.
    """
    vcpu = v.vcpu[0]
    walked = walk_guest(t, s, h, v, m, address, kind)
    if walked != WALK_OK:
        return EXIT_GUEST_PML_FULL if walked == WALK_PML_FULL else EXIT_GUEST_FAULT
    gfn, access = vcpu.walker.gfn, vcpu.walker.pte_access
    k = find_slot(s, gfn)
    if kind == WRITE and present and is_tracked(t, gfn):
        return EMULATED
    if k >= 0 and kind == WRITE and s.slots[k].flags & READONLY:
        vcpu.pf_emulate += 1
        return EXIT_MMIO
    vcpu.slow_faults += 1 - again
    reason, pfn, host_writable, fits = fault_page(s, h, m, k, gfn, kind)
    if reason != DONE:
        return reason
    row = vcpu.root
    while t.pages[row].level > vcpu.walker.level:
        level = np.int64(t.pages[row].level)
        i = index_of(address, level)
        below = level - 1
        t.pages[row].write_flooding_count = 0
        table, allowed = vcpu.walker.table_gfn[below], vcpu.walker.pt_access[below]
        row, _ = _next_page(t, s, h, v, m, row, i, table, False, allowed)
        if row < 0:
            return EXIT_NOMEM
    no_huge = m.nx and kind == EXEC
    goal = np.int64(1) if no_huge else min(fits, vcpu.walker.level)
    row, i = _descend(t, s, h, v, m, row, address, gfn, goal, fits, no_huge, access)
    if row < 0:
        return EXIT_NOMEM
    reason = _finish(t, s, h, v, m, k, row, i, gfn, pfn, host_writable, access, kind, False)
    if reason != EXIT_MMIO and t.pages[row].level == 1:
        if is_direct(t, row):
            _prefetch_direct(t, s, h, v, m, row, i)
        else:
            _prefetch_shadowed(t, s, h, v, m, row, i)
    return reason


@helper
def shadow_fault(t, s, h, v, m, address, kind, row, i, level):
    """Handle a violation or misconfiguration at the end of a walk where the shadow MMU has pages; returns an exit reason.

    DONE: enter again; EMULATED: KVM did the write itself, because the page holds a guest table.
    """
    vcpu = v.vcpu[0]
    mmio, kind, present, again = begin_fault(m, s, v, address, kind, t.sptes[row, i], level)
    if mmio:
        return EXIT_MMIO
    if vcpu.pgd >= 0:
        reason = _guest_fault(t, s, h, v, m, address, kind, present, again)
        return emulate_write(t, s, v, m, vcpu.walker.gfn) if reason == EMULATED else reason
    if present and kind == WRITE and t.kvm[0].indirect_shadow_pages > 0 and is_tracked(t, address):
        return emulate_write(t, s, v, m, address)
    k = find_slot(s, address)
    may_be_fast = not again and k >= 0 and (m.fast_fault or m.shadow) and ((present and kind == WRITE) or (not m.ad and not present))
    if may_be_fast and fast_fault(t, s, v, m, k, address, kind, False, row, i, level):
        return DONE
    if k >= 0 and kind == WRITE and s.slots[k].flags & READONLY:
        vcpu.pf_emulate += 1
        return EXIT_MMIO
    vcpu.slow_faults += 1 - again
    args = t, s, h, v, m, k, address, kind, False
    reason = shadow_map_gfn(*args) if m.shadow else direct_map_gfn(*args, row, i, level)
    return emulate_write(t, s, v, m, address) if reason == EMULATED else reason
