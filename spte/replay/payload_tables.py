"""L1's tables for L2 as the recorder lays them out in its page-table slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from spte.guest_tables import FRAME, GuestTables
from spte.host.backing import Backing
from spte.replay.payload import PML4

FIRST_PAGE = 64  # of the slot: the first root
WINDOWS = (0xC0000, 0xD0000)  # the payload and its page tables: a 2 MiB page each, so that L2 can run
ALWAYS = 5  # what the recorder never takes from an NPT entry


class L1Tables(GuestTables):
    """L1's tables for L2.

    Parameters
    ----------
    backing : Backing
        Memory of the slot.
    ept : bool
        EPT, else NPT.
    roots : int
        Roots to lay out.
    """

    def __init__(self, backing: Backing, *, ept: bool, roots: int) -> None:
        super().__init__(backing, PML4 << 12, "ept" if ept else "npt", page=FIRST_PAGE)
        self._always = 0 if ept else ALWAYS
        for root in range(roots):
            if root:
                self.add_root()
            for gfn in WINDOWS:
                self.map(gfn, gfn, level=2, root=root)
        self.roots.reverse()  # the recorder lays out the tables of its last root first

    def map_recorded(self, gfn: int, to: int, *, level: int, perm: int, ad: int, root: int) -> None:
        """Map one page as ``l2_map`` does: `ad` presets A (1) and D (2)."""
        self.map(gfn, to, level=level, perm=perm | self._always, accessed=bool(ad & 1), dirty=bool(ad & 2), root=root)

    def recorded(self, entry: int, perm: int) -> int:
        """Return `entry` with permissions as the recorder writes them."""
        return self.permissions(entry, perm | self._always)

    def listing(self, root: int, gfns: npt.NDArray[np.int64]) -> list[list[Any]]:
        """Return ``[level, first, n, flags]`` runs of the leaf entries of `gfns`."""
        runs: list[list[Any]] = []
        for gfn in gfns.tolist():
            _, entry, level = self.entry(gfn, root)
            flags, last = f"{entry & ~FRAME:x}", runs[-1] if runs else None
            if last and last[0] == level and last[3] == flags and last[1] + last[2] == gfn:
                last[2] += 1
            else:
                runs.append([level, gfn, 1, flags])
        return runs
