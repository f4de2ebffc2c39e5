"""The two paths of a fault, which guest accesses and prefaults share: a leaf mended in place, or made anew.

The slow path: host page, goal level, walk with splits and links, leaf.

Beside other vCPUs an entry is changed by compare-and-exchange, and the page marked afterwards: else a harvest could take its bit before
the entry is writable, and the write after would be seen by nobody. Where nothing was, the slow path maps; all else asks for the VM alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spte._numba.atomics import is_shared
from spte._numba.jit import helper, kernel_noinline
from spte.arrays.slots import LOG_DIRTY_PAGES, READONLY
from spte.arrays.vcpu import (
    DONE,
    EMULATED,
    EV_FAST,
    EV_FAULT,
    EV_MMIO,
    EV_SET,
    EV_SPTE,
    EXEC,
    EXIT_EFAULT,
    EXIT_EXCLUSIVE,
    EXIT_HOST,
    EXIT_MMIO,
    EXIT_NOMEM,
    READ,
    WRITE,
)
from spte.bits import ACC_ALL, ACC_EXEC, MMU_PRESENT, ONE, SHIFT_PAGE, U64, WRITABLE, ZERO, child_of, is_leaf, is_link
from spte.host.pages import HOST_COW, HOST_EFAULT, HOST_OK, ZERO_PFN, host_fault, spin_lock, spin_unlock
from spte.mmu.arena import count_leaf, free_row
from spte.mmu.make_spte import is_access_tracked, make_leaf, restore_access_tracked
from spte.mmu.mark_dirty import mark_dirty, note
from spte.mmu.memslot import max_mapping_level
from spte.mmu.page_track import may_write
from spte.mmu.tdp_mmu import drop_entry, free_table, link, new_child, read_spte, replace_spte, split_entry
from spte.mmu.walk import index_of


class Fault(NamedTuple):
    """One fault on its way through the MMU: KVM's struct kvm_page_fault."""

    addr: np.int64  # page number that the guest accessed: an address of tables that KVM shadows, else a gfn
    gfn: np.int64
    slot: np.int64  # index of its memslot, -1: none
    kind: np.int64  # of access
    prefetch: bool  # no guest asked for the page
    present: bool  # the entry was present
    row: np.int64  # entry `i` of `row`, of `level`, is where the walk of KVM's tables ended
    i: np.int64
    level: np.int64


class HostPage(NamedTuple):
    """What the host gave for a fault, as struct kvm_page_fault holds it too."""

    pfn: np.uint64
    map_writable: bool
    max_level: np.int64  # largest level at which it may be mapped


NO_ROW, CHANGED = np.int64(-1), np.int64(-2)  # instead of a table: there is none; another vCPU was quicker
MMIO_GEN_LOW, MMIO_GEN_HIGH = U64(0xFF), U64(0x7FF)
MMIO_GENERATION = (MMIO_GEN_LOW << U64(3)) | (MMIO_GEN_HIGH << U64(52))


@helper
def mmio_spte(m, s, gfn):
    """Build the MMIO SPTE of `gfn` with the slots' generation."""
    gpa = U64(gfn) << SHIFT_PAGE
    gen = U64(s.memslots[0].generation)
    spte = m.lay.mmio | gpa | ((gpa & m.lay.l1tf) << U64(5))
    return spte | ((gen & MMIO_GEN_LOW) << U64(3)) | (((gen >> U64(8)) & MMIO_GEN_HIGH) << U64(52))


@helper
def is_fresh_mmio(m, s, spte):
    """Tell whether an MMIO SPTE has the slots' generation, so that nothing was put there since."""
    return (spte & MMIO_GENERATION) == (mmio_spte(m, s, np.int64(0)) & MMIO_GENERATION)


@helper
def begin_fault(m, s, v, gfn, kind, spte, level):
    """Count a violation or misconfiguration; returns ``(still MMIO, kind, entry is present)``."""
    vcpu = v.vcpu[0]
    present = is_leaf(spte, level) and (spte & (m.lay.readable | WRITABLE | m.lay.x)) != ZERO
    if level == 1 and (spte & m.lay.mmio_mask) == m.lay.mmio_test and (spte & MMU_PRESENT) == ZERO:
        vcpu.misconfigs += 1
        if is_fresh_mmio(m, s, spte):
            return True, kind, present
        if m.lay.x != ZERO:  # an EPT misconfiguration does not say what the access was: KVM takes it for a read
            kind = np.int64(READ)
    else:
        vcpu.violations += 1
    vcpu.pf_taken += 1
    if v.log.shape[0] > 0:
        note(v, EV_FAULT, gfn, kind, present, 0, 0)
    return False, kind, present


@helper
def _install(t, v, m, row, i, gfn, level, old, new):
    """Put leaf `new` at an entry that may hold anything; keeps the counts of leaves right. False as `replace_spte`."""
    kvm = t.kvm[0]
    if not replace_spte(t, row, i, old, new):
        return False
    if (old & MMU_PRESENT) == ZERO:
        count_leaf(t, level, 1)
    elif level > 1 and is_link(old):
        count_leaf(t, level, 1)
        freed = kvm.freed
        free_table(t, child_of(old))
        kvm.remote_tlb_flush_requests += kvm.freed - freed if m.freed_table_flush else 1
    kvm.sptes_written += 1
    if v.log.shape[0] > 0:
        note(v, EV_SPTE, gfn, level, old, new, 0)
        note(v, EV_SET, gfn, level, new, 0, 0)
    return True


@helper
def _next_table(t, v, m, row, i, nx_mark):
    """Return the table below entry `i` of `row`, made by split, zap or link as the entry asks; NO_ROW if the arena is full, or CHANGED."""
    kvm = t.kvm[0]
    old = read_spte(t, row, i)
    huge = (old & MMU_PRESENT) != ZERO
    if huge and is_link(old):
        return child_of(old)
    if is_shared(t) and huge:
        return CHANGED
    if huge and m.split_in_place:
        child = split_entry(t, m, row, i)
    else:
        if huge:
            drop_entry(t, m, row, i)
            kvm.remote_tlb_flush_requests += 1
        child = new_child(t, m, row, i)
        if child >= 0:
            if not link(t, m, row, i, old, child):
                free_row(t, child)
                return CHANGED
            kvm.sptes_written += 1
    if child >= 0:
        t.pages[child].nx_huge_page_disallowed = nx_mark
        kvm.nx_lpage_splits += nx_mark == 2
        if v.log.shape[0] > 0:
            note(v, EV_SPTE, t.pages[child].gfn, t.pages[row].level, old, t.sptes[row, i], 0)
    return child


@helper
def nx_holds(t, m, spte, level):
    """Tell whether an entry links to a table that the NX mitigation keeps from becoming a huge leaf."""
    return m.nx and level > 1 and is_link(spte) and (m.nx_any_table or t.pages[child_of(spte)].nx_huge_page_disallowed != 0)


@helper
def nx_mark_of(m, level, max_level):
    """Return how a table that an exec fault links at `level` counts: 2 if a huge leaf would fit there, 1 if not, 0 not at all."""
    if level <= max_level:
        return 2 if m.nx_marks else 0
    return 1 if m.nx_marks == 2 else 0


@helper
def faultin_pfn(t, s, h, m, f):
    """Ask the host for the page of fault `f`: KVM's kvm_mmu_faultin_pfn; returns ``(exit reason, HostPage)``."""
    if not is_shared(t):
        return _faultin_pfn(s, h, m, f)
    spin_lock(h.pages_lock)
    found = _faultin_pfn(s, h, m, f)
    spin_unlock(h.pages_lock)
    return found


@helper
def _faultin_pfn(s, h, m, f):
    none = HostPage(ZERO, False, np.int64(1))
    k = f.slot
    if k < 0:
        return DONE, none
    hpage = s.slots[k].hpage + f.gfn - s.slots[k].base_gfn
    code, writable, zero = host_fault(h, hpage, f.kind == WRITE)
    if code == HOST_COW:
        return EXIT_HOST, none
    if code != HOST_OK:
        return EXIT_EFAULT if code == HOST_EFAULT else EXIT_NOMEM, none
    flags = s.slots[k].flags
    level = np.int64(1) if flags & LOG_DIRTY_PAGES else max_mapping_level(s, h, k, f.gfn, m.max_level)
    return DONE, HostPage(ZERO_PFN if zero else U64(hpage), writable and not flags & READONLY, level)


@helper
def allowed(m, spte, kind):
    """Tell whether hardware lets an access of `kind` through a present leaf."""
    if kind == WRITE:
        return (spte & WRITABLE) != ZERO
    if kind == EXEC:
        return (spte & (m.lay.x | m.lay.nx)) == m.lay.x
    return (spte & m.lay.readable) != ZERO


@kernel_noinline
def fast_page_fault(t, s, v, m, f):
    """Mend a write-protected or access-tracked leaf, where the walk ended, without mmu_lock; True if the access may go on."""
    vcpu = v.vcpu[0]
    old = read_spte(t, f.row, f.i)
    if not is_leaf(old, f.level):
        return False
    if allowed(m, old, f.kind):
        vcpu.pf_fast += 1
        vcpu.pf_spurious += not f.prefetch
        return True
    new = old
    if is_access_tracked(old):
        new = restore_access_tracked(new, m.lay)
    if f.kind == WRITE and (old & m.lay.mmu_writable) != ZERO:
        new |= WRITABLE
        if f.level > 1 and (not m.fast_huge_fault or s.slots[f.slot].flags & LOG_DIRTY_PAGES):
            return False
    fixed = new != old and allowed(m, new, f.kind)
    if fixed:
        if not replace_spte(t, f.row, f.i, old, new):
            return True  # the access is tried again
        if (new & ~old & WRITABLE) != ZERO:
            mark_dirty(t, s, v, f.slot, f.gfn)
        t.kvm[0].sptes_written += 1
        vcpu.pf_fast += 1
        vcpu.pf_fixed += not f.prefetch
    if v.log.shape[0] > 0:
        note(v, EV_FAST, f.gfn, old, new, fixed, 0)
    return fixed


@kernel_noinline
def map_gfn(t, s, h, v, m, f):
    """Take the slow path of fault `f` from where the walk ended: host page, goal level, tables, leaf: KVM's kvm_tdp_mmu_map.

    Returns an exit reason, DONE if the leaf is there or the access is to be tried again. EMULATED asks the caller to do the write for
    the guest: the page holds a guest table that must not change unseen.
    """
    vcpu = v.vcpu[0]
    if is_shared(t) and (f.slot < 0 or read_spte(t, f.row, f.i) != m.lay.nonpresent):
        return EXIT_EXCLUSIVE
    reason, page = faultin_pfn(t, s, h, m, f)
    if reason != DONE:
        return reason
    gfn, k, row, i, level = f.gfn, f.slot, f.row, f.i, f.level
    no_huge = m.nx and f.kind == EXEC
    goal = np.int64(1) if no_huge else page.max_level
    if level < goal:  # tables below the entry to be set
        if is_shared(t):
            return EXIT_EXCLUSIVE
        row = vcpu.root
        level = np.int64(t.pages[row].level)
        i = index_of(gfn, level)
    while True:
        if level == goal and nx_holds(t, m, read_spte(t, row, i), level):
            goal -= 1
        if level == goal:
            break
        nx_mark = nx_mark_of(m, level, page.max_level) if no_huge else 0
        row = _next_table(t, v, m, row, i, nx_mark)
        if row < 0:
            return EXIT_NOMEM if row == NO_ROW else DONE
        level -= 1
        i = index_of(gfn, level)
    old = read_spte(t, row, i)
    if is_shared(t) and old != m.lay.nonpresent:
        return DONE
    if k < 0:
        new = mmio_spte(m, s, gfn)
        t.sptes[row, i] = new
        t.kvm[0].sptes_written += 1
        vcpu.pf_emulate += not f.prefetch
        vcpu.pf_mmio_spte_created += 1
        if v.log.shape[0] > 0:
            note(v, EV_SPTE, gfn, level, old, new, 0)
            note(v, EV_MMIO, gfn, 0, 0, 0, 0)
        return EXIT_MMIO
    if f.prefetch and m.prefault_leaves and is_leaf(old, level):
        return DONE
    first = page.pfn & ~((ONE << U64(9 * (level - 1))) - ONE)
    write = page.map_writable and ((old & WRITABLE) != ZERO or may_write(t, gfn, True, f.prefetch))
    access = np.int64(ACC_ALL & ~ACC_EXEC if m.nx and level > 1 else ACC_ALL)
    new = make_leaf(m, level, first, old, f.prefetch, page.map_writable, np.int64(t.pages[row].role), access, write)
    logs = (new & WRITABLE) != ZERO and s.slots[k].flags & LOG_DIRTY_PAGES != 0
    if logs and not is_shared(t):
        mark_dirty(t, s, v, k, gfn)
    if new != old and not _install(t, v, m, row, i, gfn, level, old, new):
        return DONE
    if logs and is_shared(t):
        mark_dirty(t, s, v, k, gfn)
    if f.kind == WRITE and page.map_writable and not write:
        return EMULATED
    if new == old:
        vcpu.pf_spurious += not f.prefetch
        return DONE
    vcpu.pf_fixed += not f.prefetch
    return DONE
