"""The shadow MMU's fault path: direct roots, and roots that shadow a guest's tables; leaves in rmaps, neighbours prefetched."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.slots import READONLY
from spte.arrays.vcpu import DONE, EMULATED, EXEC, EXIT_GUEST_FAULT, EXIT_GUEST_PML_FULL, EXIT_MMIO, EXIT_NOMEM, WRITE
from spte.bits import (
    ACC_ALL,
    MMU_PRESENT,
    ROLE_ACCESS,
    ROLE_ACCESS_SHIFT,
    ROLE_AD_DISABLED,
    ROLE_IS_DIRECT,
    ROLE_LEVEL,
    U64,
    ZERO,
    child_of,
    is_link,
)
from spte.mmu.memslot import find_slot
from spte.mmu.page_fault import Fault, HostPage, begin_fault, fast_page_fault, faultin_pfn, map_gfn, mmio_spte, nx_holds, nx_mark_of
from spte.mmu.page_track import is_direct, is_tracked
from spte.mmu.shadow.emulate import emulate_write
from spte.mmu.shadow.guest_walk import WALK_FAULT, WALK_OK, WALK_PML_FULL, walk_guest
from spte.mmu.shadow.page import drop_leaf, link_page, set_shadowed, unlink_page
from spte.mmu.shadow.set_leaf import invalidate_address, prefetch_direct, prefetch_shadowed, set_leaf
from spte.mmu.shadow.sync import get_page, sync_children
from spte.mmu.walk import index_of


@kernel_noinline
def _make_page(t, s, h, v, m, row, i, gfn, direct, access):
    """Find or make the page below entry `i` of `row`, which links to none, and link it; returns it, -1: arena full.

    A huge leaf there is dropped with a flush. A page that shadows a guest table is in step with it before it is linked.
    """
    level = np.int64(t.pages[row].level) - 1
    role = (np.int64(t.pages[row].role) & ~(ROLE_LEVEL | ROLE_IS_DIRECT | ROLE_ACCESS)) | level | (access << ROLE_ACCESS_SHIFT)
    child = get_page(t, s, h, v, m, gfn, level, role | ROLE_IS_DIRECT if direct else role)
    if child < 0:
        return child
    if not direct and level > 1:
        sync_children(t, s, h, v, m, child)
    if (t.sptes[row, i] & MMU_PRESENT) != ZERO:
        drop_leaf(t, s, m, row, i)
        t.kvm[0].remote_tlb_flush_requests += 1
    link_page(t, s, m, row, i, child)
    return child


@helper
def _next_page(t, s, h, v, m, row, i, gfn, direct, access):
    """Return the page below entry `i` of `row`: KVM's kvm_mmu_get_child_sp; and whether it was not linked before. -1: arena full."""
    old = t.sptes[row, i]
    if is_link(old):
        return child_of(old), False
    child = _make_page(t, s, h, v, m, row, i, gfn, direct, access)
    return child, child >= 0


@helper
def _finish(t, s, v, m, f, page, row, i, access):
    """Put the leaf that fault `f` is after at entry `i` of `row`, or an MMIO SPTE where no slot is; returns an exit reason."""
    vcpu = v.vcpu[0]
    level = np.int64(t.pages[row].level)
    if f.slot < 0:
        if (t.sptes[row, i] & MMU_PRESENT) != ZERO:
            drop_leaf(t, s, m, row, i)
        set_shadowed(t, row, i, f.gfn, access)
        t.sptes[row, i] = mmio_spte(m, s, f.gfn)
        t.kvm[0].sptes_written += 1
        vcpu.pf_emulate += not f.prefetch
        vcpu.pf_mmio_spte_created += 1
        return EXIT_MMIO
    first = page.pfn & ~((U64(1) << U64(9 * (level - 1))) - U64(1))
    gfn = f.gfn & -(np.int64(1) << (9 * (level - 1)))
    changed, refused = set_leaf(t, s, v, m, f.slot, row, i, gfn, HostPage(first, page.map_writable, level), access, f.prefetch)
    reason = EMULATED if refused and f.kind == WRITE else DONE
    if reason == DONE:
        vcpu.pf_fixed += changed and not f.prefetch
        vcpu.pf_spurious += not (changed or f.prefetch)
    return reason


@helper
def shadow_map_gfn(t, s, h, v, m, f):
    """Take the slow path for a direct root: KVM's direct_page_fault. Returns as `map_gfn`."""
    reason, page = faultin_pfn(t, s, h, m, f)
    if reason != DONE:
        return reason
    row = v.vcpu[0].root
    access = np.int64(ACC_ALL)
    row, i = _descend(t, s, h, v, m, f, page, row, np.int64(t.pages[row].level) - 1, access)  # a PAE root has no leaves
    if row < 0:
        return EXIT_NOMEM
    reason = _finish(t, s, v, m, f, page, row, i, access)
    if reason != EXIT_MMIO and not np.int64(t.pages[row].role) & ROLE_AD_DISABLED and t.pages[row].level == 1:
        prefetch_direct(t, s, h, v, m, row, i)
    return reason


@helper
def _descend(t, s, h, v, m, f, page, row, most, access):
    """Go down from `row` over direct pages, to a leaf of level `most` or below; returns row (-1: arena full) and index."""
    kvm = t.kvm[0]
    no_huge = m.nx and f.kind == EXEC
    goal = np.int64(1) if no_huge else min(page.max_level, most)
    level = np.int64(t.pages[row].level)
    i = index_of(f.addr, level)
    while True:
        if level == goal and nx_holds(t, m, t.sptes[row, i], level):
            goal -= 1
        if level == goal:
            return row, i
        first = f.gfn & -(np.int64(1) << (9 * (level - 1)))
        old = t.sptes[row, i]
        if is_link(old) and (np.int64(t.pages[child_of(old)].role) & ROLE_ACCESS) >> ROLE_ACCESS_SHIFT != access:
            unlink_page(t, s, m, row, i)  # what the guest allows has changed
            kvm.remote_tlb_flush_requests += 1
        nx_mark = nx_mark_of(m, level, page.max_level) if no_huge else 0
        child, fresh = _next_page(t, s, h, v, m, row, i, first, True, access)
        if child < 0:
            return child, i
        if fresh and nx_mark and t.pages[child].nx_huge_page_disallowed == 0:
            t.pages[child].nx_huge_page_disallowed = nx_mark
            kvm.nx_lpage_splits += nx_mark == 2
        row = child
        level -= 1
        i = index_of(f.addr, level)


@kernel_noinline
def _guest_fault(t, s, h, v, m, f):
    """Take the slow path for a root that shadows the guest's tables: KVM's FNAME(page_fault). `f` is to be completed by their walk.

    Returns an exit reason: DONE if the leaf is there; EXIT_GUEST_FAULT if the guest's tables do not allow the access.
    """
    vcpu = v.vcpu[0]
    walked = walk_guest(t, s, h, v, m, f.addr, f.kind)
    if walked != WALK_OK:
        if walked == WALK_FAULT and vcpu.walker.pte_access != 0:
            invalidate_address(t, s, h, v, m, f.addr)
        return EXIT_GUEST_PML_FULL if walked == WALK_PML_FULL else EXIT_GUEST_FAULT
    gfn, access = vcpu.walker.gfn, vcpu.walker.pte_access
    k = find_slot(s, gfn)
    f = Fault(f.addr, gfn, k, f.kind, f.prefetch, f.present, f.row, f.i, f.level)
    if f.kind == WRITE and f.present and is_tracked(t, gfn):
        return EMULATED
    if k >= 0 and f.kind == WRITE and s.slots[k].flags & READONLY:
        vcpu.pf_emulate += 1
        return EXIT_MMIO
    vcpu.slow_faults += 1
    reason, page = faultin_pfn(t, s, h, m, f)
    if reason != DONE:
        return reason
    row = vcpu.root
    while t.pages[row].level > vcpu.walker.level:
        level = np.int64(t.pages[row].level)
        i = index_of(f.addr, level)
        below = level - 1
        t.pages[row].write_flooding_count = 0
        table, allowed = vcpu.walker.table_gfn[below], vcpu.walker.pt_access[below]
        row, _ = _next_page(t, s, h, v, m, row, i, table, False, allowed)
        if row < 0:
            return EXIT_NOMEM
    row, i = _descend(t, s, h, v, m, f, page, row, vcpu.walker.level, access)
    if row < 0:
        return EXIT_NOMEM
    reason = _finish(t, s, v, m, f, page, row, i, access)
    if reason != EXIT_MMIO and t.pages[row].level == 1:
        if is_direct(t, row):
            prefetch_direct(t, s, h, v, m, row, i)
        else:
            prefetch_shadowed(t, s, h, v, m, row, i)
    return reason


@helper
def shadow_fault(t, s, h, v, m, address, kind, row, i, level):
    """Handle a violation or misconfiguration at the end of a walk where the shadow MMU has pages; returns an exit reason.

    DONE: enter again; EMULATED: KVM did the write itself, because the page holds a guest table.
    """
    vcpu = v.vcpu[0]
    mmio, kind, present = begin_fault(m, s, v, address, kind, t.sptes[row, i], level)
    if mmio:
        return EXIT_MMIO
    if vcpu.pgd >= 0:
        reason = _guest_fault(t, s, h, v, m, Fault(address, address, np.int64(-1), kind, False, present, row, i, level))
        return emulate_write(t, s, v, m, vcpu.walker.gfn) if reason == EMULATED else reason
    if present and kind == WRITE and t.kvm[0].indirect_shadow_pages > 0 and is_tracked(t, address):
        return emulate_write(t, s, v, m, address)
    k = find_slot(s, address)
    may_be_fast = k >= 0 and (m.fast_fault or m.shadow) and ((present and kind == WRITE) or (not m.ad and not present))
    f = Fault(address, address, k, kind, False, present, row, i, level)
    if may_be_fast and fast_page_fault(t, s, v, m, f):
        return DONE
    if k >= 0 and kind == WRITE and s.slots[k].flags & READONLY:
        vcpu.pf_emulate += 1
        return EXIT_MMIO
    vcpu.slow_faults += 1
    reason = shadow_map_gfn(t, s, h, v, m, f) if m.shadow else map_gfn(t, s, h, v, m, f)
    return emulate_write(t, s, v, m, address) if reason == EMULATED else reason
