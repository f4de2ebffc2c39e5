"""Reverse maps of the shadow MMU: for each gfn of a slot and level, the SPTEs that map it; for each page, those that link to it.

A head is 0 (none), ``ref + 1`` (one SPTE), or ``-node - 1`` (a chain of nodes ``[ref, next head]``). ``ref`` is row * 512 + index.
"""

from __future__ import annotations

import numpy as np

from spte._numba.jit import helper
from spte.arrays.context import BASE, NODE_FREE, NODE_HIGH, RMAP1


@helper
def head_of(s, k, gfn, level):
    """Return the place of the head of `gfn` at `level` in slot `k`, -1 if the slot has no rmaps."""
    first = s.table[k, RMAP1 + level - 1]
    if first < 0:
        return np.int64(-1)
    shift = 9 * (level - 1)
    return first + (gfn >> shift) - (s.table[k, BASE] >> shift)


@helper
def _new_node(s, ref, following):
    node = s.node_meta[NODE_FREE]
    if node != 0:
        s.node_meta[NODE_FREE] = s.nodes[node, 1]
    else:
        node = s.node_meta[NODE_HIGH] + 1
        s.node_meta[NODE_HIGH] = node
    s.nodes[node, 0] = ref
    s.nodes[node, 1] = following
    return -node - 1


@helper
def chain_add(s, heads, at, ref):
    """Add SPTE `ref` to the chain of ``heads[at]``."""
    head = heads[at]
    if head == 0:
        heads[at] = ref + 1
        return
    if head > 0:
        head = _new_node(s, head - 1, np.int64(0))
    heads[at] = _new_node(s, ref, head)


@helper
def ref_of(s, head):
    """Return the SPTE that a head names first."""
    return head - 1 if head > 0 else s.nodes[-head - 1, 0]


@helper
def next_of(s, head):
    """Return the head of the rest of the chain, 0 at its end."""
    return np.int64(0) if head > 0 else s.nodes[-head - 1, 1]


@helper
def chain_remove(s, heads, at, ref):
    """Take SPTE `ref` from the chain of ``heads[at]``."""
    head = heads[at]
    before = np.int64(0)
    while head != 0 and ref_of(s, head) != ref:
        before = head
        head = next_of(s, head)
    if head == 0:
        return
    rest = next_of(s, head)
    if before == 0:
        heads[at] = rest
    else:
        s.nodes[-before - 1, 1] = rest
    if head < 0:
        s.nodes[-head - 1, 1] = s.node_meta[NODE_FREE]
        s.node_meta[NODE_FREE] = -head - 1


@helper
def rmap_add(s, k, gfn, level, ref):
    """Note that SPTE `ref` maps `gfn` at `level`."""
    chain_add(s, s.rmaps, head_of(s, k, gfn, level), ref)


@helper
def rmap_remove(s, k, gfn, level, ref):
    """Forget that SPTE `ref` maps `gfn` at `level`."""
    chain_remove(s, s.rmaps, head_of(s, k, gfn, level), ref)
