"""The shadow MMU of one VM for direct roots (tdp_mmu=N): shadow pages in a hash, leaves in rmaps, work under them."""

from __future__ import annotations

import contextlib

import numpy as np

from spte.context import ROOT, I64s, Mode
from spte.kernels.rmap import age_rmaps, zap_all_shadow, zap_rmaps
from spte.memslot import Memslot, Memslots
from spte.platform import Platform
from spte.shadow_fault import get_page
from spte.tables import free_row
from spte.tdp_mmu import NO_ROOTS, TdpMmu


class ShadowMmu(TdpMmu):
    """Page tables of a VM whose direct roots belong to the shadow MMU.

    Parameters are those of `TdpMmu`, and `memslots` whose rmaps it keeps.
    """

    def __init__(self, platform: Platform, mode: Mode, memslots: Memslots) -> None:
        super().__init__(platform, mode)
        self.memslots = memslots

    def _new_root(self) -> int:
        return int(get_page(self.tables, self.mode, np.int64(0), np.int64(4), np.int64(self._role)))

    def _put(self, root: int) -> None:
        """Free the obsolete `root` with a flush once no vCPU holds it."""
        if root >= 0 and not any(vcpu.arrays.reg[ROOT] == root for vcpu in self.vcpus):
            free_row(self.tables, np.int64(root))
            self.flush()

    def _held(self) -> I64s:
        """Return the rows that vCPUs hold as roots."""
        return np.unique(np.array([vcpu.arrays.reg[ROOT] for vcpu in self.vcpus], np.int64))

    def roots(self, as_id: int) -> I64s:
        """Return no roots: leaves are found by rmap."""
        return NO_ROOTS

    def zap_all(self) -> None:
        """Drop every SPTE with a flush, if any page was valid; roots that vCPUs hold stay, invalid, until those enter again."""
        with self.traced():
            valid = zap_all_shadow(self.tables, self.mode, self._held())
        self.memslots.clear_rmaps()
        self._root = -1
        if valid:
            self.flush()

    def zap_gfns(self, slot: Memslot, start: int, end: int) -> int:
        """Drop every SPTE of `slot` that maps gfns ``[start, end)``; returns SPTEs dropped, the caller flushes if not 0."""
        s, k = self.memslots.place(slot)
        with self.traced():
            return int(zap_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end)))

    def age_gfns(self, slot: Memslot, start: int, end: int, *, clear: bool) -> int:
        """Return how many leaves of `slot` in gfns ``[start, end)`` were accessed; `clear`: make their next use visible."""
        s, k = self.memslots.place(slot)
        with self.traced():
            return int(age_rmaps(self.tables, s, self.mode, k, np.int64(start), np.int64(end), clear))

    def traced(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that records nothing: the kernel has no tracepoint for these changes."""
        return contextlib.nullcontext()
