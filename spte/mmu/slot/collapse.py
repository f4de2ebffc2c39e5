"""After logging, make huge mappings of a slot possible again: KVM's kvm_mmu_recover_huge_pages.

In place from 6.13 on; before, kvm_mmu_zap_collapsible_sptes dropped tables or leaves.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel, prefetch
from spte.bits import ZERO, child_of, is_leaf, is_link
from spte.kernels._collapse import first_leaf, make_huge_spte
from spte.mmu.arena import count_leaf
from spte.mmu.make_spte import set_executable
from spte.mmu.memslot import max_mapping_level, may_collapse
from spte.mmu.slot.sweep import place
from spte.mmu.tdp_mmu import drop_entry, free_table
from spte.mmu.walk import index_of, table_at

AHEAD = 16  # entries; the first leaf of a table that far on is prefetched


@helper
def _collapse_entry(t, m, row, i):
    """Drop the table linked at entry `i` of `row`, or put a huge leaf in its place; tells whether the entry changed."""
    kvm = t.kvm[0]
    level = np.int64(t.pages[row].level)
    if not m.recover:
        drop_entry(t, m, row, i)
    else:
        child = child_of(t.sptes[row, i])
        small = first_leaf(t.flat, np.int64(0), child, level - 1)
        if small == ZERO:
            return False
        huge = make_huge_spte(small, level)
        t.sptes[row, i] = set_executable(huge, m.lay, False) if m.nx else huge
        free_table(t, child)
        count_leaf(t, level, 1)
        kvm.sptes_written += 1
    kvm.collapsed += 1
    if m.flush_each:
        kvm.remote_tlb_flush_requests += 1
    return True


@kernel
def collapse_slot(t, s, h, mode, roots, k):
    """Collapse every table of slot `k` whose gfns one larger leaf may map, 1 GiB before 2 MiB: KVM's kvm_tdp_mmu_recover_huge_pages.

    Returns entries changed. With one flush a table they are counted here, else the caller flushes the slot if the result is not 0.
    """
    m = mode[0]
    start = s.slots[k].base_gfn
    end = start + s.slots[k].npages
    done = 0
    for r in range(roots.shape[0]):
        for level in range(3, 1, -1):
            span = np.int64(1) << (9 * (level - 1))
            gfn = (start + span - 1) & -span
            while gfn < end:
                row = table_at(t, roots[r], gfn, level)
                if row < 0:
                    gfn = (gfn | ((span << 9) - 1)) + 1
                    continue
                first = index_of(gfn, level)
                for i in range(first, min(np.int64(512), first + ((end - gfn + span - 1) >> (9 * (level - 1))))):
                    if i + AHEAD < 512:
                        prefetch(t.flat, child_of(t.sptes[row, i + AHEAD]) * 512)
                    if is_link(t.sptes[row, i]) and max_mapping_level(s, h, k, gfn, m.max_level) >= level:
                        done += _collapse_entry(t, m, row, i)
                    gfn += span
    return done


@kernel
def zap_collapsible(t, s, h, mode, k):
    """Drop the leaves of slot `k` that larger ones may replace, rows in arena order: KVM's kvm_mmu_zap_collapsible_sptes.

    Returns leaves dropped. With one flush a leaf they are counted here, else the caller flushes if the result is not 0.
    """
    m = mode[0]
    kvm = t.kvm[0]
    start = s.slots[k].base_gfn
    end = start + s.slots[k].npages
    done = 0
    for row in range(kvm.rows):
        if t.pages[row].level == 0 or t.pages[row].shadow:
            continue
        level = np.int64(t.pages[row].level)
        lo, hi = place(t, row, s.slots[k].id >> 16, start, end)
        for i in range(lo, hi):
            gfn = t.pages[row].gfn + (np.int64(i) << (9 * (level - 1)))
            if is_leaf(t.sptes[row, i], level) and gfn >= start and may_collapse(s, h, m, k, gfn, level, m.collapse_pages):
                drop_entry(t, m, row, i)
                done += 1
    kvm.collapsed += done
    if m.flush_each:
        kvm.remote_tlb_flush_requests += done
    return done
