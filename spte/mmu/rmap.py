"""Reverse maps of the shadow MMU: for each gfn of a slot and level, the SPTEs that map it; for each page, those that link to it.

A head is 0 (none), ``ref + 1`` (one SPTE), or ``-node - 1`` (a chain of nodes ``[ref, next head]``). ``ref`` is row * 512 + index.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper, kernel_noinline


@helper
def head_of(s, k, gfn, level):
    """Return the place of the head of `gfn` at `level` in slot `k`, -1 if the slot has no rmaps."""
    first = s.slots[k].rmap[level - 1]
    if first < 0:
        return np.int64(-1)
    shift = 9 * (level - 1)
    return first + (gfn >> shift) - (s.slots[k].base_gfn >> shift)


@helper
def _new_node(s, ref, following):
    node = s.nodes[0].more
    if node != 0:
        s.nodes[0].more = s.nodes[node].more
    else:
        node = s.nodes[0].spte + 1
        s.nodes[0].spte = node
    s.nodes[node].spte = ref
    s.nodes[node].more = following
    return -node - 1


@helper
def pte_list_add(s, head, ref):
    """Return the head of a chain with SPTE `ref` added."""
    if head == 0:
        return np.int64(ref + 1)
    if head > 0:
        head = _new_node(s, head - 1, np.int64(0))
    return _new_node(s, ref, head)


@helper
def ref_of(s, head):
    """Return the SPTE that a head names first."""
    return head - 1 if head > 0 else s.nodes[-head - 1].spte


@helper
def next_of(s, head):
    """Return the head of the rest of the chain, 0 at its end."""
    return np.int64(0) if head > 0 else s.nodes[-head - 1].more


@kernel_noinline
def pte_list_remove(s, head, ref):
    """Return the head of a chain without SPTE `ref`."""
    before, at = np.int64(0), head
    while at != 0 and ref_of(s, at) != ref:
        before = at
        at = next_of(s, at)
    if at == 0:
        return head
    rest = next_of(s, at)
    if at < 0:
        s.nodes[-at - 1].more = s.nodes[0].more
        s.nodes[0].more = -at - 1
    if before == 0:
        return rest
    s.nodes[-before - 1].more = rest
    return head


@helper
def rmap_add(s, k, gfn, level, ref):
    """Note that SPTE `ref` maps `gfn` at `level`."""
    at = head_of(s, k, gfn, level)
    s.rmaps[at] = pte_list_add(s, s.rmaps[at], ref)


@helper
def rmap_remove(s, k, gfn, level, ref):
    """Forget that SPTE `ref` maps `gfn` at `level`."""
    at = head_of(s, k, gfn, level)
    head = s.rmaps[at]
    s.rmaps[at] = np.int64(0) if head == ref + 1 else pte_list_remove(s, head, ref)
