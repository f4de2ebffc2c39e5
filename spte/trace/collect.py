"""Page writes in any order become a trace: sorted, distinct inside an epoch, in memory that the result bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.trace.model import MAX_BYTES, MAX_NPAGES, PAGES_PER_2M, Int64Array, Trace, TraceError

Uint64Array = npt.NDArray[np.uint64]

GFN_BITS = 40
"""A guest-physical address has at most 52 bits (MAXPHYADDR), a gfn 40."""
MAX_EPOCHS = 1 << 23
MAX_WRITES = (MAX_BYTES - 16 * MAX_EPOCHS) // 4
"""Page writes that a file of `MAX_BYTES` holds beside the bounds of `MAX_EPOCHS` epochs."""
MAX_RUNS = 1 << 12
"""Most runs of pages that `meta` names; a trace that was squeezed into more says only how many."""
_SHIFT = np.uint64(GFN_BITS)
_GFN = np.uint64((1 << GFN_BITS) - 1)
_REGION_SHIFT = np.uint64(PAGES_PER_2M.bit_length() - 1)
_IN_REGION = np.uint64(PAGES_PER_2M - 1)
_WAIT = 1 << 21
"""Keys that may wait to be merged although those merged are fewer."""


class Collector:
    """Collects (epoch, page) pairs; a pair that comes twice is kept once.

    Epochs are numbers from -MAX_EPOCHS, in any order; the first that `add` was told of becomes epoch 0 of the trace.
    """

    def __init__(self) -> None:
        self._merged: Uint64Array = np.empty(0, np.uint64)
        self._waiting: list[Uint64Array] = []
        self._bounds: tuple[int, int] | None = None

    def add(self, epoch: Int64Array | int, gfn: npt.NDArray[Any]) -> None:
        """Take writes: `gfn` uint64 [n], each in its `epoch`, int64 [n] or one for all; no gfn at all is an idle epoch.

        Raises
        ------
        TraceError
            If a page number needs more than 40 bits, or a file could not hold the epochs or the writes.
        """
        epochs, gfns = np.asarray(epoch, np.int64), np.asarray(gfn, np.uint64)
        if not epochs.size:
            return
        if gfns.size and int(gfns.max()) >> GFN_BITS:
            raise TraceError(f"page {int(gfns.max()):#x} lies beyond 52 bits of address; is it an address, not a page?")
        low, high = int(epochs.min()), int(epochs.max())
        if self._bounds is not None:
            low, high = min(low, self._bounds[0]), max(high, self._bounds[1])
        if high - low >= MAX_EPOCHS or low < -MAX_EPOCHS or high >= MAX_EPOCHS:
            raise TraceError(f"the writes lie in more than {MAX_EPOCHS} epochs; take a longer interval")
        self._bounds = low, high
        if gfns.size:
            self._waiting.append(_distinct((epochs + MAX_EPOCHS).astype(np.uint64) << _SHIFT | gfns))
        if sum(map(len, self._waiting)) > max(_WAIT, len(self._merged)):
            self._merge()

    def trace(
        self,
        interval_ns: int,
        *,
        npages: int | None = None,
        squeeze: bool = False,
        meta: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Return the trace of all that was added; every epoch lasts `interval_ns`.

        Parameters
        ----------
        interval_ns : int
            Length of an epoch.
        npages : int, optional
            Pages of the guest; by default up to the last one that was written. Rounded up to a multiple of 512.
        squeeze : bool
            Leave out the 2 MiB regions that no epoch wrote; `meta["runs"]` then tells where each run of pages lay.
        meta : mapping, optional
            More of the trace's `meta`.

        Raises
        ------
        TraceError
            If nothing was added, or a page does not fit into the guest.
        """
        self._merge()
        if self._bounds is None:
            raise TraceError("there is no write in it, hence no trace")
        low, high = self._bounds
        gfn = self._merged & _GFN
        epoch = (self._merged >> _SHIFT).astype(np.int64) - (MAX_EPOCHS + low)
        about = {**(meta or {}), "interval_s": interval_ns / 1e9}
        if squeeze:
            gfn, runs = squeezed(gfn)
            about["runs"] = runs if len(runs) <= MAX_RUNS else len(runs)
        return Trace(
            np.arange(high - low + 2, dtype=np.int64) * interval_ns,
            np.searchsorted(epoch, np.arange(high - low + 2)),
            gfn.astype(np.uint32) if not gfn.size or int(gfn.max()) < 1 << 32 else gfn,
            page_space(gfn, npages),
            about,
        )

    def _merge(self) -> None:
        if self._waiting:
            self._merged = _distinct(np.concatenate([self._merged, *self._waiting]))
            self._waiting.clear()
        if len(self._merged) > MAX_WRITES:
            raise TraceError(f"more than {MAX_WRITES} page writes, more than a file holds; take a longer interval")


def _distinct(keys: Uint64Array) -> Uint64Array:
    """Return the distinct `keys`, ascending; sorts them in place."""
    keys.sort()  # np.unique takes four times as long: it hashes before it sorts
    first = np.ones(len(keys), np.bool_)
    first[1:] = keys[1:] != keys[:-1]
    distinct: Uint64Array = keys[first]
    return distinct


def squeezed(gfn: Uint64Array) -> tuple[Uint64Array, list[list[int]]]:
    """Return `gfn` without the 2 MiB regions that it does not touch, and the runs [first gfn, pages] that are left.

    A region stays whole and aligned, so that what could be one 2 MiB page still can.
    """
    regions, place = np.unique(gfn >> _REGION_SHIFT, return_inverse=True)
    starts = np.flatnonzero(np.diff(regions, prepend=regions[:1] - np.uint64(2)) != 1)
    lengths = np.diff(starts, append=len(regions)) * PAGES_PER_2M
    first = (regions[starts] << _REGION_SHIFT).tolist()
    return place.astype(np.uint64) << _REGION_SHIFT | gfn & _IN_REGION, [list(run) for run in zip(first, lengths.tolist(), strict=True)]


def page_space(gfn: Uint64Array, npages: int | None) -> int:
    """Return `npages`, or if it is None the pages up to the last of `gfn`, rounded up to a multiple of 512."""
    last = int(gfn.max()) if gfn.size else 0
    if npages is not None and not last < npages:
        raise TraceError(f"page {last:#x} was written; it must be below npages = {npages}")
    needed = last + 1 if npages is None else npages
    rounded = -(-needed // PAGES_PER_2M) * PAGES_PER_2M
    if rounded > MAX_NPAGES:
        raise TraceError(
            f"page {last:#x} was written; one memslot holds {MAX_NPAGES} pages: "
            "name the guest's slots, or squeeze out the regions that nothing wrote"
        )
    return rounded
