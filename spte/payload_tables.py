"""L1's tables for L2 as the recorder lays them out in guest memory: EPT or NPT, one page after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.bits import PFN_MASK

FIRST_PAGE = 0xD0040  # the first root
RWX, LARGE, MEMORY_WB = 7, 1 << 7, 6 << 3
EPT_A, EPT_D = 1 << 8, 1 << 9
NPT_A, NPT_D, NPT_READABLE = 1 << 5, 1 << 6, 5
WINDOWS = (0xC0000, 0xD0000)  # the payload and its page tables: a 2 MiB page each, so that L2 can run
FRAME = int(PFN_MASK)


class L1Tables:
    """L1's tables for L2.

    Parameters
    ----------
    words : callable
        Returns the 512 words of a gfn, to be read and written.
    ept : bool
        EPT entries, else NPT.
    roots : int
        Roots to lay out.
    """

    def __init__(self, words: Callable[[int], npt.NDArray[np.uint64]], *, ept: bool, roots: int) -> None:
        self._words = words
        self._leaf = MEMORY_WB if ept else 0
        self._link = RWX if ept else RWX | NPT_A  # the recorder presets A in the links of NPT alone
        self._flags = (EPT_A, EPT_D) if ept else (NPT_A, NPT_D)
        self._always = 0 if ept else NPT_READABLE  # of the permissions an NPT entry can only refuse W
        self._next = FIRST_PAGE
        self.roots = []
        for _ in range(roots):
            self.roots.append(self._new_page())
            for gfn in WINDOWS:
                self.map(len(self.roots) - 1, gfn, gfn, level=2, perm=RWX, ad=3)

    def _new_page(self) -> int:
        page, self._next = self._next, self._next + 1
        self._words(page)[:] = 0
        return page

    def map(self, root: int, gfn: int, l1_gfn: int, *, level: int, perm: int, ad: int) -> None:
        """Let L2's `gfn` be L1's `l1_gfn`, by a page of `level`; `ad` presets A (1) and D (2)."""
        page, at = self.roots[root], 4
        while at > level:
            entries, i = self._words(page), gfn >> 9 * (at - 1) & 511
            if not entries[i]:
                entries[i] = self._new_page() << 12 | self._link
            page, at = int(entries[i]) >> 12 & (FRAME >> 12), at - 1
        accessed, dirty = self._flags
        flags = perm | self._always | self._leaf | (accessed if ad & 1 else 0) | (dirty if ad & 2 else 0) | (LARGE if level > 1 else 0)
        self._words(page)[gfn >> 9 * (level - 1) & 511] = l1_gfn << 12 | flags

    def path(self, root: int, gfn: int) -> tuple[list[int], int, int]:
        """Return the tables of the walk for `gfn`, its level and the place of the last entry."""
        page, level, pages = self.roots[root], 4, []
        while True:
            pages.append(page)
            i = gfn >> 9 * (level - 1) & 511
            entry = int(self._words(page)[i])
            if level == 1 or entry & LARGE or not entry:
                return pages, level, i
            page, level = (entry & FRAME) >> 12, level - 1

    def entry(self, root: int, gfn: int) -> tuple[int, int, int]:
        """Return the leaf entry of `gfn`: its gpa, its value, its level."""
        pages, level, i = self.path(root, gfn)
        return (pages[-1] << 12) + 8 * i, int(self._words(pages[-1])[i]), level

    def translate(self, root: int, gfn: int) -> int:
        """Return L1's gfn of L2's `gfn`."""
        _, entry, level = self.entry(root, gfn)
        return ((entry & FRAME) >> 12) + (gfn & ((1 << 9 * (level - 1)) - 1))

    def changed(self, value: int, *, perm: int | None = None, l1_gfn: int | None = None, clears: str = "") -> int:
        """Return a leaf entry with other permissions or another page, A and D cleared as `clears` says."""
        accessed, dirty = self._flags
        if perm is not None:
            value = value & ~RWX | perm | self._always
        if l1_gfn is not None:
            value = value & ~FRAME | l1_gfn << 12
        return value & ~({"": 0, "d": dirty, "a": accessed | dirty}[clears])

    def listing(self, root: int, gfns: npt.NDArray[np.int64]) -> list[list[Any]]:
        """Return ``[level, first, n, flags]`` runs of the leaf entries of `gfns`."""
        runs: list[list[Any]] = []
        for gfn in gfns.tolist():
            _, entry, level = self.entry(root, gfn)
            flags, last = f"{entry & ~FRAME:x}", runs[-1] if runs else None
            if last and last[0] == level and last[3] == flags and last[1] + last[2] == gfn:
                last[2] += 1
            else:
                runs.append([level, gfn, 1, flags])
        return runs
