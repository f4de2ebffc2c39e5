"""Userspace's side of a dirty ring: entries are taken oldest first, and marked, so that RESET_DIRTY_RINGS frees them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIRTY = 1
HARVESTED = 3
"""Flags of an entry that userspace collected: dirty | reset."""


class RingReader:
    """Reads one vCPU's ring; it knows which entry is next."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, ring: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
        """Take the dirty entries of `ring` (`VirtualCpu.ring`), oldest first, up to the first that is not dirty.

        Their flags in `ring` are changed; a copy of them is returned.
        """
        order = (self._next + np.arange(len(ring))) % len(ring)
        dirty = ring["flags"][order] == DIRTY
        places = order[: len(ring) if dirty.all() else int(dirty.argmin())]
        taken = ring[places]
        ring["flags"][places] = HARVESTED
        self._next = (self._next + len(places)) % len(ring)
        return taken


def masks(bits: npt.NDArray[np.int64]) -> int:
    """Return in how many masks of 64 pages RESET takes entries of these page numbers: how often the next lies in another word."""
    return int(np.count_nonzero(np.diff(bits >> 6, prepend=-1)))
