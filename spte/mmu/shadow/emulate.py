"""Guest writes that KVM does itself because the page holds a guest table that it shadows: the pages follow at once."""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline
from spte.arrays.vcpu import EMULATED
from spte.bits import MMU_PRESENT, ZERO
from spte.mmu.mark_dirty import mark_dirty
from spte.mmu.memslot import find_slot
from spte.mmu.page_track import bucket_of, is_direct
from spte.mmu.shadow.page import drop_entry_of, zap_page

FLOOD = 3  # writes in a row after which a page above level 1 is zapped whole: its table seems to be none any more
GPTE_BYTES = 8


@helper
def _track_write(t, s, m, gfn, offset):
    """Empty entry ``offset / 8`` of every page that shadows the table at `gfn`; one flush if that dropped something."""
    flush = False
    row = np.int64(t.hash[bucket_of(t, gfn)]) - 1
    while row >= 0:
        following = np.int64(t.pages[row].hash_link) - 1
        if t.pages[row].level > 0 and t.pages[row].gfn == gfn and not is_direct(t, row):  # a zap may have freed the next one too
            t.pages[row].write_flooding_count += t.pages[row].level > 1
            if t.pages[row].write_flooding_count >= FLOOD:
                zap_page(t, s, m, row)
                flush = True
            else:
                i = np.int64(offset // GPTE_BYTES)
                flush = flush or (t.sptes[row, i] & MMU_PRESENT) != ZERO
                drop_entry_of(t, s, m, row, i)
        row = following
    t.kvm[0].remote_tlb_flush_requests += flush


@kernel_noinline
def emulate_write(t, s, v, m, gfn):
    """Do the guest's write to `gfn`, ``reg.store_offset`` bytes into the page: dirty, and seen by the pages that shadow it."""
    vcpu = v.vcpu[0]
    vcpu.pf_emulate += 1
    mark_dirty(t, s, v, find_slot(s, gfn), gfn)
    _track_write(t, s, m, gfn, vcpu.store_offset)
    return EMULATED
