"""Guest access beside other vCPUs and a harvest: `spte.cpu.run` without the VM's lock. See docs/threads.md for the orders it keeps."""

from __future__ import annotations

import numpy as np

from spte._numba.atomics import fetch_add, load, relax, store, swap
from spte._numba.jit import helper, kernel
from spte.arrays.vcpu import (
    CONFIRMED,
    DONE,
    EXIT_EXCLUSIVE,
    EXIT_HOST,
    EXIT_NEEDBREAK,
    EXIT_NOMEM,
    EXIT_RING_FULL,
    IN_GUEST,
    NEEDBREAK,
    READ,
    REQUEST,
)
from spte.bits import is_leaf, is_link
from spte.cpu.run import LEAST_TO_LIST, fault, leave, room, soft_full
from spte.cpu.walk_ahead import ONE_BY_ONE, is_kicked, run_ahead
from spte.mmu.arena import take_row
from spte.mmu.dirty_log.pml import drain
from spte.mmu.page_fault import allowed
from spte.mmu.tdp_mmu import read_spte
from spte.mmu.walk import forget_leaf_rows, list_leaf_rows, walk

LOOKS = 1000  # for a confirmation, before the waiting thread gives way


@kernel
def request_exit(requests):
    """Ask a vCPU to exit once; returns what `has_exited` is to be asked for: kvm_make_request, kvm_vcpu_kick."""
    return fetch_add(requests, REQUEST, 1) + 1


@kernel
def has_exited(requests, request):
    """Wait a while until the vCPU has exited since `request`, or is outside; returns whether it has."""
    for _ in range(LOOKS):
        if load(requests, IN_GUEST) == 0 or load(requests, CONFIRMED) >= request:
            return True
        relax()
    return False


@kernel
def top_up(t, own, count):
    """Take rows from the arena until the list of free rows in `own` has `count` more: mmu_topup_memory_caches."""
    for _ in range(count):
        row = take_row(t, 0, 0, 0)
        if row < 0:
            return
        t.pages[row].parent_ptes = own[0].free_row
        own[0].free_row = row + 1


@helper
def _kicked(t, s, v, m):
    """Exit because another thread asks for it, and confirm that at last; returns why the run ends, DONE to enter again."""
    request = load(v.requests, REQUEST)
    v.vcpu[0].exits += 1
    drain(t, s, v, m)
    store(v.requests, CONFIRMED, request)
    if load(v.requests, NEEDBREAK) != 0:
        return EXIT_NEEDBREAK
    return EXIT_RING_FULL if soft_full(v) else DONE


@helper
def _try_fault(t, s, h, v, m, gfn, kind, row, i, level, spte):
    """Handle a fault on `spte` as `fault` does; EXIT_EXCLUSIVE, and nothing is counted, if it wants the VM for itself."""
    vcpu = v.vcpu[0]
    counted = vcpu.violations, vcpu.misconfigs, vcpu.pf_taken, vcpu.slow_faults, vcpu.exits
    vcpu.exits += 1
    reason = fault(t, s, h, v, m, gfn, kind, row, i, level)
    if reason == EXIT_NOMEM or reason == EXIT_HOST or reason == EXIT_EXCLUSIVE:
        vcpu.violations, vcpu.misconfigs, vcpu.pf_taken, vcpu.slow_faults, vcpu.exits = counted
        # Another vCPU may have mapped the page since the walk.
        return DONE if spte == m.lay.nonpresent and read_spte(t, row, i) != spte else EXIT_EXCLUSIVE
    return reason


@kernel
def run_shared(t, s, h, v, mode, gfns, kinds, start):
    """Run accesses ``gfns[start:]`` as `spte.cpu.run.run` does, with `SharedTables`, until the guest is left.

    Also ends when another thread needs the VM for itself (EXIT_NEEDBREAK), or the next access does (EXIT_EXCLUSIVE). Of the rest of the
    caller's arrays, `v` and ``s.memslots`` are the vCPU's own.
    """
    m = mode[0]
    vcpu = v.vcpu[0]
    n = gfns.shape[0]
    kind = np.int64(kinds[0]) if kinds.shape[0] else np.int64(READ)
    swap(v.requests, IN_GUEST, 1)  # before the first look at an SPTE
    store(v.requests, CONFIRMED, load(v.requests, REQUEST))
    vcpu.run_flags = 0
    at, together, reason = start, start, DONE  # accesses before `together` are done one by one
    listed, unlisted = forget_leaf_rows(t), start - n
    if soft_full(v):
        reason = EXIT_RING_FULL
    began = False  # each run does something, however often it is kicked
    while at < n and reason == DONE:
        if began and is_kicked(v):
            reason = _kicked(t, s, v, m)
            continue
        began = True
        end = at + 1
        if at >= together:
            end = min(n, at + room(v))
            most = min(n - at, at - unlisted) >> 2
            if listed == 0 and most >= LEAST_TO_LIST:
                listed = list_leaf_rows(t, vcpu.root, most)
        at = run_ahead(t, s, v, m, gfns, kinds, at, end, listed)
        if at == end:
            continue
        gfn = np.int64(gfns[at])
        if kinds.shape[0] > 1:
            kind = np.int64(kinds[at])
        row, i, level = walk(t, vcpu.root, gfn)
        spte = read_spte(t, row, i)
        if is_leaf(spte, level) and allowed(m, spte, kind):
            if vcpu.pml_enabled and vcpu.pml_index > 511:
                vcpu.exits += 1
                vcpu.pml_fulls += 1
                drain(t, s, v, m)
        elif level == 1 or not is_link(spte):
            drain(t, s, v, m)
            reason = _try_fault(t, s, h, v, m, gfn, kind, row, i, level, spte)
            together = at + ONE_BY_ONE  # as faults come in clusters
        if reason == DONE and soft_full(v):
            reason = EXIT_RING_FULL
    leave(t, s, v, m, gfns, at, reason)
    store(v.requests, IN_GUEST, 0)
    return at
