"""MMU notifiers: how whoever maps host pages into a guest hears that they change, before they do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from spte.host import pages as hostmm

Ranges = Sequence[tuple[int, int]]  # first host page, pages


class MmuNotifier(Protocol):
    """A user of host pages: all that a `Backing` knows of a VM."""

    def invalidate_range(self, ranges: Ranges) -> bool:
        """Drop every SPTE of `ranges` of host pages and flush once; returns whether one did."""

    def clear_young(self, hpage: int, count: int) -> None:
        """Take the accessed state of host pages ``[hpage, hpage + count)``."""


def invalidate_range(users: Iterable[MmuNotifier], ranges: Ranges) -> bool:
    """Call `invalidate_range` of each of `users`; returns whether one had an SPTE there."""
    dropped = [user.invalidate_range(ranges) for user in users]
    return any(dropped)


def clear_young(users: Iterable[MmuNotifier], hpage: int, count: int) -> None:
    """Call `clear_young` of each of `users`."""
    for user in users:
        user.clear_young(hpage, count)


def host_write(users: Iterable[MmuNotifier], hpage: int) -> bool:
    """Make the host map `hpage` writable, copying a zero page; returns whether the copy dropped an SPTE of any of `users`."""
    return hostmm.write_page(np.int64(hpage)) == hostmm.HOST_COW and invalidate_range(users, [(hpage, 1)])
