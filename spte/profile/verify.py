"""Whether every page written was reported: two bitmaps a slot, compared at each harvest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.profile.report import Epoch


def compare(written: npt.NDArray[np.uint64], logs: Sequence[npt.NDArray[np.uint64]], per_slot: int, others: str) -> Epoch:
    """Return what an epoch wrote and what its harvest reported.

    Parameters
    ----------
    written : ndarray of uint64[slots, words]
        Bitmap of the pages written, a row a slot.
    logs : sequence of ndarray of uint64[words]
        Bitmap of the pages reported, one a slot.
    per_slot : int
        Pages of a slot.
    others : str
        What pages are that were reported and not written: ``"initially_set"`` or ``"over_reported"``.
    """
    total: dict[str, Any] = {"written": 0, "reported": 0, "initially_set": 0, "over_reported": 0, "lost": 0}
    first_lost = None
    for slot, log in enumerate(logs):
        expected = written[slot]
        missing = expected & ~log
        for name, words in (
            ("written", expected),
            ("reported", log),
            (others, log & ~expected),
            ("lost", missing),
        ):
            total[name] += int(np.bitwise_count(words).sum(dtype=np.int64))
        if first_lost is None and (at := np.flatnonzero(missing)).size:
            word = int(missing[at[0]])
            first_lost = slot * per_slot + int(at[0]) * 64 + (word & -word).bit_length() - 1
    return Epoch(**total, first_lost=first_lost)
