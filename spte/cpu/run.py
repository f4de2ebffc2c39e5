"""Guest access: the hardware's walk with A/D bits and PML, and KVM's fault path for direct tables.

State of an access, tried again after each exit that KVM handles by itself:

| entry found | hardware | KVM |
|---|---|---|
| permission, A and D set | done | |
| permission, A or D missing | sets them; with PML a D 0 -> 1 is logged, and a full buffer exits first | drains, enters again |
| present, no permission | violation | fast fault, else the slow path |
| not present | violation | slow path |
| MMIO | misconfiguration | exit to userspace |

The caller must be exclusive on the VM's tables; `spte.cpu.run_shared` is for those that are not.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel
from spte.arrays.slots import READONLY
from spte.arrays.vcpu import (
    DONE,
    EMULATED,
    EV_PML,
    EV_PML_FULL,
    EV_RING_EXIT,
    EXEC,
    EXIT_INTERNAL,
    EXIT_LOG,
    EXIT_MMIO,
    EXIT_NEEDBREAK,
    EXIT_RING_FULL,
    EXIT_ROOT,
    EXIT_SHADOW,
    NO_ENTRY,
    NO_EXIT,
    READ,
    WRITE,
)
from spte.bits import ROLE_INVALID, SHIFT_PAGE, TYPE_DISABLED, TYPE_MASK, U64, ZERO, is_leaf
from spte.cpu.walk_ahead import AHEAD, NEAR, ONE_BY_ONE, PREFETCH_BEFORE, PREFETCH_BLOCK, prefetch_for_faults, run_ahead
from spte.mmu.dirty_log.pml import drain
from spte.mmu.first_touch import first_touches
from spte.mmu.mark_dirty import U32_MASK, note
from spte.mmu.memslot import find_slot
from spte.mmu.page_fault import Fault, allowed, begin_fault, fast_page_fault, map_gfn
from spte.mmu.shadow.page_fault import shadow_fault
from spte.mmu.tdp_mmu import read_spte
from spte.mmu.walk import forget_leaf_rows, list_leaf_rows, walk

HW_DONE, HW_PML_FULL, HW_VIOLATION = 0, 1, 2  # outcomes of an access in hardware
FAULT = 64  # accesses that take as long as a fault
LEAST_TO_LIST = 512  # tables; at most one for each four accesses, before and after, that fault in none
LOG_ROOM = 2048  # events that one access may add: a drain of 512 marks and pushes, and its faults


@helper
def _hardware(t, v, m, gfn, kind, row, i, level):
    """Let hardware alone do an access whose walk ended at entry `i` of `row`; returns whether it did, else why it exits."""
    vcpu = v.vcpu[0]
    spte = t.sptes[row, i]
    if not is_leaf(spte, level) or not allowed(m, spte, kind):
        return HW_VIOLATION
    missing = (m.lay.accessed | m.lay.dirty if kind == WRITE else m.lay.accessed) & ~spte
    if missing == ZERO or (spte & TYPE_MASK) == TYPE_DISABLED or not m.hw_ad:
        return HW_DONE
    if vcpu.pml_enabled:
        index = vcpu.pml_index
        if index > 511:
            return HW_PML_FULL
        if (missing & m.lay.dirty) != ZERO:
            v.pml[U64(index)] = U64(gfn) << SHIFT_PAGE
            vcpu.pml_index = (index - 1) & 0xFFFF
            vcpu.pml_entries += 1
            if v.log.shape[0] > 0:
                note(v, EV_PML, gfn, index, level, (missing & m.lay.accessed) != ZERO, 0)
    t.sptes[row, i] = spte | missing
    return HW_DONE


@helper
def room(v):
    """Return how many accesses may be walked together: no more than the PML buffer takes, else walks are thrown away at the exit."""
    vcpu = v.vcpu[0]
    if vcpu.pml_enabled:
        return max(np.int64(1), (vcpu.pml_index + 1) & 0xFFFF)
    return np.int64(1) << 62


@helper
def soft_full(v):
    """Tell before a guest entry whether the ring still stands at its soft limit; if not, take the request back."""
    vcpu = v.vcpu[0]
    if vcpu.ring_soft_full == 0:
        return False
    if ((vcpu.dirty_index - vcpu.reset_index) & U32_MASK) >= vcpu.soft_limit:
        return True
    vcpu.ring_soft_full = 0
    return False


@helper
def fault(t, s, h, v, m, gfn, kind, row, i, level):
    """Handle a violation or misconfiguration of a TDP MMU's root; returns an exit reason, DONE to enter again."""
    vcpu = v.vcpu[0]
    mmio, kind, present = begin_fault(m, s, v, gfn, kind, read_spte(t, row, i), level)
    if mmio:
        return EXIT_MMIO
    k = find_slot(s, gfn)
    f = Fault(gfn, gfn, k, kind, False, present, row, i, level)
    may_be_fast = k >= 0 and m.fast_fault and ((present and kind == WRITE) or (not m.ad and not present))
    if may_be_fast and fast_page_fault(t, s, v, m, f):
        return DONE
    if k >= 0 and kind == WRITE and s.slots[k].flags & READONLY:
        vcpu.pf_emulate += 1
        return EXIT_MMIO
    vcpu.slow_faults += 1
    return map_gfn(t, s, h, v, m, f)


@helper
def _may_run_on(v, m, gfns, kinds, at):
    """Tell whether faults from access `at` on may be alike: the next gfn follows, nothing looks at single ones."""
    plain = kinds.shape[0] == 1 and kinds[0] != EXEC and v.log.shape[0] == 0
    quiet = v.vcpu[0].ring_soft_full == 0
    return plain and quiet and at + 1 < gfns.shape[0] and gfns[at + 1] == gfns[at] + 1


@kernel
def run(t, s, h, v, mode, gfns, kinds, start):
    """Run accesses ``gfns[start:]`` in the guest; returns the index of the first access not finished.

    Kind ``kinds[0]`` serves all if there is only one. The reason for stopping is in ``vcpu.exit_reason``. PML is drained at
    each exit, so also when this returns, unless the guest is not left.
    """
    m = mode[0]
    vcpu = v.vcpu[0]
    n = gfns.shape[0]
    kind = np.int64(kinds[0]) if kinds.shape[0] else np.int64(READ)
    reason = DONE
    at = start
    prefetched = max(start, vcpu.prefetched)
    ahead, resumed = max(start, vcpu.ahead), vcpu.ahead > 0
    due = vcpu.due if resumed else start + vcpu.piece
    listed, unlisted = forget_leaf_rows(t), start if resumed else start - n
    shadowed = m.shadow or vcpu.pgd >= 0 or t.kvm[0].indirect_shadow_pages > 0
    if not vcpu.run_flags & NO_ENTRY and soft_full(v):
        reason = EXIT_RING_FULL
    while at < n and reason == DONE:
        if at >= due:
            due = at + vcpu.piece
            if t.kvm[0].needbreak:
                reason = EXIT_NEEDBREAK
                continue
        if at >= ahead and v.log.shape[0] == 0:  # a log wants each access alone
            first, end = at, min(n, due, at + room(v))
            most = min(n - at, at - unlisted) >> 2
            if listed == 0 and most >= LEAST_TO_LIST:
                listed = list_leaf_rows(t, vcpu.root, most)
            at = run_ahead(t, s, v, m, gfns, kinds, first, end, listed)
            ahead = at if at == end else at + 1 if at - first >= AHEAD else at + ONE_BY_ONE
            prefetched = max(prefetched, at)
            continue
        if ahead > at + 1 and at + PREFETCH_BEFORE >= prefetched and prefetched < n and v.log.shape[0] == 0:
            end = min(n, prefetched + PREFETCH_BLOCK)
            if abs(gfns[end - 1] - gfns[prefetched]) >= NEAR:
                prefetch_for_faults(t, s, h, vcpu.root, gfns, prefetched, end)
            prefetched = end
        gfn = np.int64(gfns[at])
        if kinds.shape[0] > 1:
            kind = np.int64(kinds[at])
        row, i, level = walk(t, vcpu.root, gfn)
        outcome = _hardware(t, v, m, gfn, kind, row, i, level)
        if outcome == HW_DONE:
            at += 1
            continue
        spte = t.sptes[row, i]
        if outcome == HW_PML_FULL:
            if v.log.shape[0] > 0:
                note(v, EV_PML_FULL, gfn, vcpu.pml_index, (m.lay.dirty & ~spte) != ZERO and kind == WRITE, 0, 0)
            vcpu.exits += 1
            if vcpu.pml_barred:
                reason = EXIT_INTERNAL
                continue
            vcpu.pml_fulls += 1
            drain(t, s, v, m)
            ahead = at
            if soft_full(v):
                reason = EXIT_RING_FULL
            elif v.log.shape[0] > 0 and vcpu.logged + LOG_ROOM > v.log.shape[0]:
                reason = EXIT_LOG
            continue
        if not shadowed and level == 1 and spte == m.lay.nonpresent and _may_run_on(v, m, gfns, kinds, at):
            drain(t, s, v, m)
            count = first_touches(t, s, h, v, m, gfns, at, kind, row, i)
            at += count
            prefetched = max(prefetched, at)
            if count > 0:
                ahead = max(ahead, at + 2)  # the next table and the run in it, before walking ahead again
                continue
        vcpu.exits += 1
        due -= FAULT
        drain(t, s, v, m)
        slow = vcpu.slow_faults
        reason = EXIT_SHADOW if shadowed else fault(t, s, h, v, m, gfn, kind, row, i, level)
        if vcpu.slow_faults != slow:
            listed, unlisted = forget_leaf_rows(t), at
        ahead = max(ahead, at + PREFETCH_BEFORE)
        if reason == DONE:
            if soft_full(v):
                reason = EXIT_RING_FULL
            elif v.log.shape[0] > 0 and vcpu.logged + LOG_ROOM > v.log.shape[0]:
                reason = EXIT_LOG
    vcpu.ahead, vcpu.prefetched, vcpu.due = max(ahead, 1), prefetched, due
    leave(t, s, v, m, gfns, at, reason)
    return at


@helper
def leave(t, s, v, m, gfns, at, reason):
    """End a run in the guest at access `at`, or only interrupt it."""
    vcpu = v.vcpu[0]
    if reason == EXIT_RING_FULL:
        vcpu.ring_fulls += 1
        if v.log.shape[0] > 0:
            note(v, EV_RING_EXIT, 0, 0, 0, 0, 0)
    interrupted = reason == EXIT_LOG or reason == EXIT_SHADOW or reason == EXIT_NEEDBREAK
    if not interrupted and not (reason == DONE and vcpu.run_flags & NO_EXIT):
        vcpu.exits += reason == DONE
        vcpu.run_flags &= NO_EXIT
        drain(t, s, v, m)
    if reason != EXIT_SHADOW:
        vcpu.ahead = vcpu.prefetched = 0
    vcpu.exit_reason = reason
    vcpu.exit_gfn = np.int64(gfns[at]) if at < gfns.shape[0] else -1


@kernel
def run_shadow(t, s, h, v, mode, gfns, kinds, start):
    """As `run`, where the shadow MMU has pages: its faults are handled here, so that the TDP MMU's loop stays small."""
    m = mode[0]
    vcpu = v.vcpu[0]
    at, reason = start, DONE
    while reason == DONE:
        at = run(t, s, h, v, mode, gfns, kinds, at)
        if vcpu.exit_reason != EXIT_SHADOW:
            return at
        gfn = np.int64(gfns[at])
        kind = np.int64(kinds[at] if kinds.shape[0] > 1 else kinds[0])
        row, i, level = walk(t, vcpu.root, gfn)
        reason = shadow_fault(t, s, h, v, m, gfn, kind, row, i, level)
        if reason == EMULATED:
            at += 1
            reason = DONE
        if reason == DONE and soft_full(v):
            reason = EXIT_RING_FULL
        if reason == DONE and np.int64(t.pages[vcpu.root].role) & ROLE_INVALID:
            reason = EXIT_ROOT
        if reason == DONE and v.log.shape[0] > 0 and vcpu.logged + LOG_ROOM > v.log.shape[0]:
            reason = EXIT_LOG
    leave(t, s, v, m, gfns, at, reason)
    return at
