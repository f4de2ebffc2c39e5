"""MMU notifiers: how whoever maps host pages into a guest hears that they change, before they do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from spte.host import pages as hostmm

Ranges = Sequence[tuple[int, int]]  # first host page, pages


class MmuNotifier(Protocol):
    """A user of host pages: all that a `Backing` knows of a VM."""

    def invalidate_range(self, ranges: Ranges) -> None:
        """Drop every SPTE of `ranges` of host pages, one notifier range together, and flush once if there was one."""

    def clear_young(self, hpage: int, count: int) -> None:
        """Take the accessed state of host pages ``[hpage, hpage + count)``."""


def invalidate_range(users: Iterable[MmuNotifier], ranges: Ranges) -> None:
    """Call `invalidate_range` of each of `users`."""
    for user in users:
        user.invalidate_range(ranges)


def clear_young(users: Iterable[MmuNotifier], hpage: int, count: int) -> None:
    """Call `clear_young` of each of `users`."""
    for user in users:
        user.clear_young(hpage, count)


def host_write(users: Iterable[MmuNotifier], hpage: int) -> int:
    """Make the host map `hpage` writable, copying a zero page, with a notifier; returns what `write_page` does."""
    code = hostmm.write_page(np.int64(hpage))
    if code == hostmm.HOST_COW:
        invalidate_range(users, [(hpage, 1)])
    return code
