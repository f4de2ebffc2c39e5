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

from spte._numba.jit import helper, kernel
from spte.arrays import context as cx
from spte.bits import ROLE_INVALID, SHIFT_PAGE, TYPE_DISABLED, TYPE_MASK, U64, ZERO
from spte.cpu.walk_ahead import AHEAD, APART, ASK, ASK_BEFORE, NEAR, ask_for_faults, run_ahead
from spte.mmu.dirty_log.pml import drain
from spte.mmu.first_touch import first_touches
from spte.mmu.memslot import U32_MASK, find_slot, note
from spte.mmu.page_fault import allowed, begin_fault, fast_fault, map_gfn
from spte.mmu.shadow.page_fault import shadow_fault
from spte.mmu.walk import forget_leaf_rows, is_leaf, list_leaf_rows, walk

DONE, PML_FULL, VIOLATION = 0, 1, 2  # outcomes of an access in hardware
STAYS, STAYED = 1, 2  # of a run: the guest is not left at its end; it was not left before it
LEAST_TO_LIST = 512  # tables; at most one for each four accesses, before and after, that fault in none
LOG_ROOM = 2048  # events that one access may add: a drain of 512 marks and pushes, and its faults


@helper
def _hardware(t, v, m, gfn, kind, row, i, level):
    """Let hardware alone do an access whose walk ended at entry `i` of `row`; returns whether it did, else why it exits."""
    spte = t.sptes[row, i]
    if not is_leaf(spte, level) or not allowed(m, spte, kind):
        return VIOLATION
    missing = (m.lay.accessed | m.lay.dirty if kind == cx.WRITE else m.lay.accessed) & ~spte
    if missing == ZERO or (spte & TYPE_MASK) == TYPE_DISABLED or not m.hw_ad:
        return DONE
    if v.reg[cx.PML_ON]:
        index = v.reg[cx.PML_INDEX]
        if index > 511:
            return PML_FULL
        if (missing & m.lay.dirty) != ZERO:
            v.pml[U64(index)] = U64(gfn) << SHIFT_PAGE
            v.reg[cx.PML_INDEX] = (index - 1) & 0xFFFF
            v.stat[cx.PML_ENTRIES] += 1
            if v.log.shape[0] > 0:
                note(v, cx.EV_PML, gfn, index, level, (missing & m.lay.accessed) != ZERO, 0)
    t.sptes[row, i] = spte | missing
    return DONE


@helper
def _room(v):
    """Return how many accesses may be walked together: no more than the PML buffer takes, else walks are thrown away at the exit."""
    if v.reg[cx.PML_ON]:
        return max(np.int64(1), (v.reg[cx.PML_INDEX] + 1) & 0xFFFF)
    return np.int64(1) << 62


@helper
def soft_full(v):
    """Tell before a guest entry whether the ring still stands at its soft limit; if not, take the request back."""
    if v.reg[cx.RING_FULL_REQUEST] == 0:
        return False
    if ((v.reg[cx.RING_DIRTY] - v.reg[cx.RING_RESET]) & U32_MASK) >= v.reg[cx.RING_SOFT]:
        return True
    v.reg[cx.RING_FULL_REQUEST] = 0
    return False


@helper
def _fault(t, s, h, v, m, gfn, kind, row, i, level):
    """Handle a violation or misconfiguration of a TDP MMU's root; returns an exit reason, cx.DONE to enter again."""
    mmio, kind, present = begin_fault(m, s, v, gfn, kind, t.sptes[row, i], level)
    if mmio:
        return cx.EXIT_MMIO
    k = find_slot(s, gfn)
    may_be_fast = k >= 0 and m.fast_fault and ((present and kind == cx.WRITE) or (not m.ad and not present))
    if may_be_fast and fast_fault(t, s, v, m, k, gfn, kind, False, row, i, level):
        return cx.DONE
    if k >= 0 and kind == cx.WRITE and s.table[k, cx.FLAGS] & cx.READONLY:
        v.stat[cx.PF_EMULATE] += 1
        return cx.EXIT_MMIO
    v.stat[cx.SLOW_FAULTS] += 1
    return map_gfn(t, s, h, v, m, k, gfn, kind, False, row, i, level)


@helper
def _may_run_on(v, m, gfns, kinds, at):
    """Tell whether faults from access `at` on may be alike: the next gfn follows, nothing looks at single ones."""
    plain = kinds.shape[0] == 1 and kinds[0] != cx.EXEC and v.log.shape[0] == 0
    quiet = v.reg[cx.RING_FULL_REQUEST] == 0
    return plain and quiet and at + 1 < gfns.shape[0] and gfns[at + 1] == gfns[at] + 1


@kernel
def run(t, s, h, v, m, gfns, kinds, start):
    """Run accesses ``gfns[start:]`` as one stay in the guest; returns the index of the first access not finished.

    Kind ``kinds[0]`` serves all if there is only one. The reason for stopping is in ``reg[cx.EXIT_REASON]``. PML is drained at
    each exit, so also when this returns.
    """
    n = gfns.shape[0]
    kind = np.int64(kinds[0]) if kinds.shape[0] else np.int64(cx.READ)
    reason = cx.DONE
    at = start
    asked = max(start, v.reg[cx.ASKED])
    ahead, resumed = max(start, v.reg[cx.AHEAD]), v.reg[cx.AHEAD] > 0
    listed, unlisted = forget_leaf_rows(t), start if resumed else start - n
    shadowed = m.shadow or v.reg[cx.PGD] >= 0 or t.meta[cx.INDIRECT] > 0
    # A stay that goes on was not left: no entry in between.
    if not v.reg[cx.STAY] & STAYED and soft_full(v):
        reason = cx.EXIT_RING_FULL
    while at < n and reason == cx.DONE:
        if at >= ahead and v.log.shape[0] == 0:  # a log wants each access alone
            first, end = at, min(n, at + _room(v))
            most = min(n - at, at - unlisted) >> 2
            if listed == 0 and most >= LEAST_TO_LIST:
                listed = list_leaf_rows(t, v.reg[cx.ROOT], most)
            at = run_ahead(t, s, v, m, gfns, kinds, first, end, listed)
            ahead = at if at == end else at + 1 if at - first >= AHEAD else at + APART
            asked = max(asked, at)
            continue
        if ahead > at + 1 and at + ASK_BEFORE >= asked and asked < n and v.log.shape[0] == 0:
            end = min(n, asked + ASK)
            if abs(gfns[end - 1] - gfns[asked]) >= NEAR:
                ask_for_faults(t, s, h, v.reg[cx.ROOT], gfns, asked, end)
            asked = end
        gfn = np.int64(gfns[at])
        if kinds.shape[0] > 1:
            kind = np.int64(kinds[at])
        row, i, level = walk(t, v.reg[cx.ROOT], gfn)
        outcome = _hardware(t, v, m, gfn, kind, row, i, level)
        if outcome == DONE:
            at += 1
            continue
        spte = t.sptes[row, i]
        if outcome == PML_FULL:
            if v.log.shape[0] > 0:
                note(v, cx.EV_PML_FULL, gfn, v.reg[cx.PML_INDEX], (m.lay.dirty & ~spte) != ZERO and kind == cx.WRITE, 0, 0)
            v.stat[cx.EXITS] += 1
            if v.reg[cx.PML_BARRED]:
                reason = cx.EXIT_INTERNAL
                continue
            v.stat[cx.PML_FULLS] += 1
            drain(t, s, v, m)
            ahead = at
            if soft_full(v):
                reason = cx.EXIT_RING_FULL
            elif v.log.shape[0] > 0 and v.reg[cx.LOGGED] + LOG_ROOM > v.log.shape[0]:
                reason = cx.EXIT_LOG
            continue
        if not shadowed and level == 1 and spte == m.lay.nonpresent and _may_run_on(v, m, gfns, kinds, at):
            drain(t, s, v, m)
            count = first_touches(t, s, h, v, m, gfns, at, kind, row, i)
            at += count
            asked = max(asked, at)
            if count > 0:
                ahead = max(ahead, at + 2)  # the next table and the run in it, before walking ahead again
                continue
        v.stat[cx.EXITS] += 1
        drain(t, s, v, m)
        slow = v.stat[cx.SLOW_FAULTS]
        reason = cx.EXIT_SHADOW if shadowed else _fault(t, s, h, v, m, gfn, kind, row, i, level)
        if v.stat[cx.SLOW_FAULTS] != slow:
            listed, unlisted = forget_leaf_rows(t), at
        ahead = max(ahead, at + ASK_BEFORE)
        if reason == cx.DONE:
            if soft_full(v):
                reason = cx.EXIT_RING_FULL
            elif v.log.shape[0] > 0 and v.reg[cx.LOGGED] + LOG_ROOM > v.log.shape[0]:
                reason = cx.EXIT_LOG
    v.reg[cx.AHEAD], v.reg[cx.ASKED] = max(ahead, 1), asked
    _leave(t, s, v, m, gfns, at, reason)
    return at


@helper
def _leave(t, s, v, m, gfns, at, reason):
    """End a stay in the guest at access `at`, or only interrupt it."""
    if reason == cx.EXIT_RING_FULL:
        v.stat[cx.RING_FULLS] += 1
        if v.log.shape[0] > 0:
            note(v, cx.EV_RING_EXIT, 0, 0, 0, 0, 0)
    stays = reason == cx.EXIT_LOG or reason == cx.EXIT_SHADOW or (reason == cx.DONE and v.reg[cx.STAY] & STAYS)
    if not stays:
        v.stat[cx.EXITS] += reason == cx.DONE
        drain(t, s, v, m)
    if reason != cx.EXIT_SHADOW:
        v.reg[cx.AHEAD] = v.reg[cx.ASKED] = 0
    v.reg[cx.EXIT_REASON] = reason
    v.reg[cx.EXIT_GFN] = np.int64(gfns[at]) if at < gfns.shape[0] else -1


@kernel
def run_shadow(t, s, h, v, m, gfns, kinds, start):
    """As `run`, where the shadow MMU has pages: its faults are handled here, so that the TDP MMU's loop stays small."""
    at, reason = start, cx.DONE
    while reason == cx.DONE:
        at = run(t, s, h, v, m, gfns, kinds, at)
        if v.reg[cx.EXIT_REASON] != cx.EXIT_SHADOW:
            return at
        gfn = np.int64(gfns[at])
        kind = np.int64(kinds[at] if kinds.shape[0] > 1 else kinds[0])
        row, i, level = walk(t, v.reg[cx.ROOT], gfn)
        reason = shadow_fault(t, s, h, v, m, gfn, kind, row, i, level)
        if reason == cx.EMULATED:
            at += 1
            reason = cx.DONE
        if reason == cx.DONE and soft_full(v):
            reason = cx.EXIT_RING_FULL
        if reason == cx.DONE and np.int64(t.role[v.reg[cx.ROOT]]) & ROLE_INVALID:
            reason = cx.EXIT_ROOT
        if reason == cx.DONE and v.log.shape[0] > 0 and v.reg[cx.LOGGED] + LOG_ROOM > v.log.shape[0]:
            reason = cx.EXIT_LOG
    _leave(t, s, v, m, gfns, at, reason)
    return at
