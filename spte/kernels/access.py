"""Guest access: the hardware's walk with A/D bits and PML, and KVM's fault path for direct tables.

State of an access, tried again after each exit that KVM handles by itself:

| entry found | hardware | KVM |
|---|---|---|
| permission, A and D set | done | |
| permission, A or D missing | sets them; with PML a D 0 -> 1 is logged, and a full buffer exits first | drains, enters again |
| present, no permission | violation | fast fault, else the slow path |
| not present | violation | slow path |
| MMIO | misconfiguration | exit to userspace |

The caller must be alone on the VM's tables.
"""

from __future__ import annotations

import numpy as np

from spte import context as cx
from spte._jit import kernel
from spte.bits import MMU_PRESENT, SHIFT_PAGE, TYPE_DISABLED, TYPE_MASK, U64, WRITABLE, ZERO
from spte.entries import is_access_tracked, restore_access_tracked
from spte.fault import map_gfn, mmio_spte
from spte.pml import drain
from spte.shadow_fault import shadow_map_gfn
from spte.slots import U32_MASK, find_slot, mark_dirty, note
from spte.tables import is_leaf, walk

LOG_ROOM = 2048  # events that one access may add: a drain of 512 marks and pushes, and its faults


@kernel
def _allowed(m, spte, kind):
    """Tell whether hardware lets an access of `kind` through a present leaf."""
    if kind == cx.WRITE:
        return (spte & WRITABLE) != ZERO
    if kind == cx.EXEC:
        return (spte & (m.lay.x | m.lay.nx)) == m.lay.x
    return (spte & m.lay.readable) != ZERO


@kernel
def soft_full(v):
    """Tell before a guest entry whether the ring still stands at its soft limit; if not, take the request back."""
    if v.reg[cx.RING_FULL_REQUEST] == 0:
        return False
    if ((v.reg[cx.RING_DIRTY] - v.reg[cx.RING_RESET]) & U32_MASK) >= v.reg[cx.RING_SOFT]:
        return True
    v.reg[cx.RING_FULL_REQUEST] = 0
    return False


@kernel
def _fast_fault(t, s, v, m, k, gfn, kind):
    """Mend a write-protected or access-tracked leaf without mmu_lock; True if the access may go on."""
    row, i, level = walk(t, v.reg[cx.ROOT], gfn)
    old = t.sptes[row, i]
    if not is_leaf(old, level):
        return False
    if _allowed(m, old, kind):
        v.stat[cx.PF_FAST] += 1
        v.stat[cx.PF_SPURIOUS] += 1
        return True
    new = old
    if is_access_tracked(old):
        new = restore_access_tracked(new, m.lay)
    if kind == cx.WRITE and (old & m.lay.mmu_writable) != ZERO:
        new |= WRITABLE
        if level > 1 and s.table[k, cx.FLAGS] & cx.LOG_DIRTY_PAGES:
            return False
    fixed = new != old and _allowed(m, new, kind)
    if fixed:
        if (new & ~old & WRITABLE) != ZERO:
            mark_dirty(t, s, v, k, gfn)
        t.sptes[row, i] = new
        t.meta[cx.SPTES_WRITTEN] += 1
        v.stat[cx.PF_FAST] += 1
        v.stat[cx.PF_FIXED] += 1
    if v.log.shape[0] > 0:
        note(v, cx.EV_FAST, gfn, old, new, fixed, 0)
    return fixed


@kernel
def _fault(t, s, h, v, m, gfn, kind, spte, level):
    """Handle a violation or misconfiguration; returns an exit reason, cx.DONE to enter again."""
    present = is_leaf(spte, level) and (spte & (m.lay.readable | WRITABLE | m.lay.x)) != ZERO
    k = find_slot(s, gfn)
    again = v.reg[cx.COUNTED]  # the host has copied the page within this same fault
    v.reg[cx.COUNTED] = 0
    if level == 1 and (spte & m.lay.mmio_mask) == m.lay.mmio_test and (spte & MMU_PRESENT) == ZERO:
        v.stat[cx.MISCONFIGS] += 1
        if spte == mmio_spte(m, s, gfn):
            return cx.EXIT_MMIO
        if m.lay.x != ZERO:  # an EPT misconfiguration does not say what the access was: KVM takes it for a read
            kind = np.int64(cx.READ)
    else:
        v.stat[cx.VIOLATIONS] += 1 - again
    if not again:
        v.stat[cx.PF_TAKEN] += 1
        if v.log.shape[0] > 0:
            note(v, cx.EV_FAULT, gfn, kind, present, 0, 0)
        may_be_fast = k >= 0 and (m.fast_fault or m.shadow) and ((present and kind == cx.WRITE) or (not m.ad and not present))
        if may_be_fast and _fast_fault(t, s, v, m, k, gfn, kind):
            return cx.DONE
    if k >= 0 and kind == cx.WRITE and s.table[k, cx.FLAGS] & cx.READONLY:
        v.stat[cx.PF_EMULATE] += 1
        return cx.EXIT_MMIO
    v.stat[cx.SLOW_FAULTS] += 1 - again
    if m.shadow:
        return shadow_map_gfn(t, s, h, v, m, k, gfn, kind, False)
    return map_gfn(t, s, h, v, m, k, gfn, kind, False)


@kernel
def run(t, s, h, v, m, gfns, kinds, start):
    """Run accesses ``gfns[start:]`` as one stay in the guest; returns the index of the first access not finished.

    Kind ``kinds[0]`` serves all if there is only one. The reason for stopping is in ``reg[cx.EXIT_REASON]``. PML is drained at
    each exit, so also when this returns.
    """
    n = gfns.shape[0]
    kind = np.int64(kinds[0]) if kinds.shape[0] else np.int64(cx.READ)
    many = kinds.shape[0] > 1
    a_and_d = m.lay.accessed | m.lay.dirty
    reason = cx.DONE
    at = start
    if soft_full(v):
        reason = cx.EXIT_RING_FULL
    while at < n and reason == cx.DONE:
        gfn = np.int64(gfns[at])
        if many:
            kind = np.int64(kinds[at])
        row, i, level = walk(t, v.reg[cx.ROOT], gfn)
        spte = t.sptes[row, i]
        if is_leaf(spte, level) and _allowed(m, spte, kind):
            want = a_and_d if kind == cx.WRITE else m.lay.accessed
            missing = want & ~spte
            if (spte & TYPE_MASK) == TYPE_DISABLED or missing == ZERO:
                at += 1
                continue
            if v.reg[cx.PML_ON]:
                index = v.reg[cx.PML_INDEX]
                if index > 511:
                    if v.log.shape[0] > 0:
                        note(v, cx.EV_PML_FULL, gfn, index, (missing & m.lay.dirty) != ZERO, 0, 0)
                    v.stat[cx.EXITS] += 1
                    v.stat[cx.PML_FULLS] += 1
                    drain(t, s, v, m)
                    if soft_full(v):
                        reason = cx.EXIT_RING_FULL
                    elif v.log.shape[0] > 0 and v.reg[cx.LOGGED] + LOG_ROOM > v.log.shape[0]:
                        reason = cx.EXIT_LOG
                    continue
                if (missing & m.lay.dirty) != ZERO:
                    v.pml[index] = U64(gfn) << SHIFT_PAGE
                    v.reg[cx.PML_INDEX] = (index - 1) & 0xFFFF
                    v.stat[cx.PML_ENTRIES] += 1
                    if v.log.shape[0] > 0:
                        note(v, cx.EV_PML, gfn, index, level, (missing & m.lay.accessed) != ZERO, 0)
            t.sptes[row, i] = spte | missing
            at += 1
            continue
        v.stat[cx.EXITS] += 1 - v.reg[cx.COUNTED]
        drain(t, s, v, m)
        reason = _fault(t, s, h, v, m, gfn, kind, spte, level)
        if reason == cx.DONE:
            if soft_full(v):
                reason = cx.EXIT_RING_FULL
            elif v.log.shape[0] > 0 and v.reg[cx.LOGGED] + LOG_ROOM > v.log.shape[0]:
                reason = cx.EXIT_LOG
    if reason == cx.EXIT_RING_FULL:
        v.stat[cx.RING_FULLS] += 1
        if v.log.shape[0] > 0:
            note(v, cx.EV_RING_EXIT, 0, 0, 0, 0, 0)
    if reason != cx.EXIT_LOG:
        v.stat[cx.EXITS] += reason == cx.DONE
        drain(t, s, v, m)
    v.reg[cx.EXIT_REASON] = reason
    v.reg[cx.EXIT_GFN] = np.int64(gfns[at]) if at < n else -1
    return at
