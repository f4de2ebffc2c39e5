"""Ranges of page numbers as arrays: merged, packed into words for the journal, laid side by side into a page space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.trace import PAGES_PER_2M

RangeArray = npt.NDArray[np.int64]
"""int64 [n, 2]: ranges [start, end) of page numbers."""
Words = npt.NDArray[np.uint64]
_LENGTH_BITS = 20
_MAX_LENGTH = 1 << _LENGTH_BITS


def merge(parts: Sequence[RangeArray]) -> RangeArray:
    """Return the union of the ranges in `parts`, each in any order: ascending, disjoint and not adjacent."""
    if not parts:
        return np.zeros((0, 2), np.int64)
    ranges = np.concatenate(parts)
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 1])
    first = np.ones(len(ranges), bool)
    first[1:] = ranges[1:, 0] > ends[:-1]
    last = np.roll(first, -1)
    return np.stack([ranges[first, 0], ends[last]], axis=1)


def count(ranges: RangeArray) -> int:
    """Return the number of pages in disjoint `ranges`."""
    return int((ranges[:, 1] - ranges[:, 0]).sum())


def expand(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return every number of the ranges that begin at `starts` and hold `lengths` numbers each."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def pack(ranges: RangeArray) -> Words:
    """Return `ranges` as words: the first page number in the upper 44 bits, the number of pages less one in the lower 20."""
    pieces = -(-(ranges[:, 1] - ranges[:, 0]) // _MAX_LENGTH)
    index = expand(np.zeros(len(ranges), np.int64), pieces)
    starts = np.repeat(ranges[:, 0], pieces) + index * _MAX_LENGTH
    lengths = np.minimum(np.repeat(ranges[:, 1], pieces) - starts, _MAX_LENGTH)
    words: Words = ((starts << _LENGTH_BITS) | (lengths - 1)).astype(np.uint64)
    return words


def unpack(words: Words) -> RangeArray:
    """Return the ranges that `pack` made `words` of, with long ones in pieces."""
    starts = (words >> np.uint64(_LENGTH_BITS)).astype(np.int64)
    lengths = (words & np.uint64(_MAX_LENGTH - 1)).astype(np.int64) + 1
    return np.stack([starts, starts + lengths], axis=1)


class PageSpace:
    """2 MiB regions of an address space laid side by side in ascending order: what lay in one huge page still does.

    Parameters
    ----------
    ranges : int64 [n, 2]
        Page numbers in that address space; each region with one of them has its place.
    """

    def __init__(self, ranges: RangeArray) -> None:
        self._regions = merge([np.stack([ranges[:, 0] // PAGES_PER_2M, -(-ranges[:, 1] // PAGES_PER_2M)], axis=1)])
        lengths = self._regions[:, 1] - self._regions[:, 0]
        self._first = np.cumsum(lengths) - lengths
        self.npages = int(lengths.sum()) * PAGES_PER_2M
        """Size of the page space in pages, a multiple of 512."""

    def gfns(self, ranges: RangeArray) -> npt.NDArray[np.int64]:
        """Return the place of every page of `ranges`, which are ascending and inside the regions."""
        region = np.searchsorted(self._regions[:, 0] * PAGES_PER_2M, ranges[:, 0], side="right") - 1
        starts = ranges[:, 0] + (self._first - self._regions[:, 0])[region] * PAGES_PER_2M
        return expand(starts, ranges[:, 1] - ranges[:, 0])

    def describe(self) -> list[list[Any]]:
        """Return ``[first gfn, number of pages, virtual address as hexadecimal text]`` of each run of regions."""
        starts, ends = (self._regions * PAGES_PER_2M).T.tolist() if len(self._regions) else ((), ())
        firsts = (self._first * PAGES_PER_2M).tolist()
        return [[first, end - start, hex(start << 12)] for first, start, end in zip(firsts, starts, ends, strict=True)]
