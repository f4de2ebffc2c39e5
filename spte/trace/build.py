"""Traces from what a program holds: dirty bitmaps, or the pages and times of writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spte._arguments import as_array, flag, integer, items
from spte.trace.collect import MAX_EPOCHS, Collector
from spte.trace.model import Int64Array, Trace, TraceError, mapping

INTERVAL_NS = 100_000_000
"""Length of an epoch where none is given: 100 ms."""
MAX_TIME_NS = 1 << 62
"""Times lie within this many ns of 0, so that their differences are int64."""


def from_bitmaps(
    bitmaps: npt.NDArray[Any] | Iterable[npt.NDArray[Any]],
    *,
    interval_ns: int = INTERVAL_NS,
    npages: int | None = None,
    squeeze: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> Trace:
    """Return the trace of dirty bitmaps, one an epoch, as KVM_GET_DIRTY_LOG returns them.

    Parameters
    ----------
    bitmaps : array [E, words] or iterable of arrays [words]
        uint64 (or int64): words in which bit 0 of word 0 is the first page; uint8: their bytes; bool: a page each.
    interval_ns : int
        Time between two bitmaps, ns.
    npages : int, optional
        Pages of the guest, rounded up to a multiple of 512; by default as many as the longest bitmap has.
    squeeze : bool
        Leave out the 2 MiB regions that no epoch wrote; `meta["runs"]` then tells where each run of pages lay.
    meta : mapping, optional
        What to say about the trace, such as `command`.

    Returns
    -------
    Trace
        One epoch for each bitmap.

    Raises
    ------
    TraceError
        If there is no bitmap, one has another dtype or shape, or a page at or above `npages` is set.

    Examples
    --------
    >>> from_bitmaps([np.array([0b101], np.uint64), np.array([0], np.uint64)]).epoch(0).tolist()
    [0, 2]
    """
    interval_ns, npages, squeeze, more = _options(interval_ns, npages, squeeze, meta)
    collected, space = Collector(), 0
    for epoch, given in enumerate(items(bitmaps, "bitmaps", "an array [epochs, words] or a list of arrays")):
        bitmap = as_array(given, f"bitmap {epoch}", TraceError)
        collected.add(epoch, pages_of(bitmap, f"bitmap {epoch}"))
        space = max(space, _pages_in(bitmap))
    return collected.trace(
        interval_ns, npages=None if squeeze else npages or space or None, squeeze=squeeze, meta={"how": "from bitmaps", **more}
    )


def from_gfns(
    t_ns: npt.ArrayLike,
    gfn: npt.ArrayLike,
    *,
    interval_ns: int = INTERVAL_NS,
    npages: int | None = None,
    squeeze: bool = False,
    meta: Mapping[str, Any] | None = None,
) -> Trace:
    """Return the trace of writes: at time `t_ns[i]` page `gfn[i]` was written.

    The order does not matter and a page may come many times. For pages that are known by epoch instead of by time, take
    ``t_ns = np.repeat(np.arange(epochs) * interval_ns, pages_in_each_epoch)``.

    Parameters
    ----------
    t_ns : int64 [N]
        Times of the writes, ns from any start.
    gfn : integers [N]
        Page numbers (4 KiB pages, not addresses), each below 2^40.
    interval_ns : int
        Length of an epoch, ns; the first epoch begins at the first write in time.
    npages : int, optional
        Pages of the guest, rounded up to a multiple of 512; by default up to the last page that was written.
    squeeze : bool
        Leave out the 2 MiB regions that no epoch wrote; `meta["runs"]` then tells where each run of pages lay.
    meta : mapping, optional
        What to say about the trace, such as `command`.

    Returns
    -------
    Trace
        Pages sorted and distinct inside each epoch, epochs of `interval_ns` from the first write to the last.

    Raises
    ------
    TraceError
        If the arrays differ in length or are no integers, or a page or the number of epochs is out of range.

    Examples
    --------
    >>> from_gfns([0, 5, 120_000_000], [7, 7, 3]).indptr.tolist()
    [0, 1, 2]
    """
    interval_ns, npages, squeeze, more = _options(interval_ns, npages, squeeze, meta)
    times, pages = as_array(t_ns, "t_ns", TraceError), as_array(gfn, "gfn", TraceError)
    for name, array in (("t_ns", times), ("gfn", pages)):
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise TraceError(f"{name} is {array.dtype} of shape {array.shape}; it must be integers in one dimension")
    if len(times) != len(pages):
        raise TraceError(f"t_ns has {len(times)} times and gfn {len(pages)} pages; each write has one of both")
    if not len(pages):
        raise TraceError("t_ns and gfn are empty; a trace needs a write")
    if int(pages.min()) < 0:
        raise TraceError(f"gfn[{int(pages.argmin())}] is {int(pages.min())}; pages are counted from 0")
    for at in (int(times.argmin()), int(times.argmax())):
        if abs(int(times[at])) > MAX_TIME_NS:
            raise TraceError(f"t_ns[{at}] is {times[at]}; times lie within {MAX_TIME_NS} ns of 0")
    collected = Collector()
    collected.add(epochs_of(times.astype(np.int64), int(times.min()), interval_ns), pages.astype(np.uint64))
    return collected.trace(interval_ns, npages=npages, squeeze=squeeze, meta={"how": "from gfns", **more})


def _options(interval_ns: Any, npages: Any, squeeze: Any, meta: Any) -> tuple[int, int | None, bool, Mapping[str, Any]]:
    """Return what both builders take beside the writes, if the types are right."""
    interval_ns = integer(interval_ns, "interval_ns", TraceError)
    check_interval(interval_ns)
    npages = None if npages is None else integer(npages, "npages", TraceError)
    return interval_ns, npages, flag(squeeze, "squeeze"), {} if meta is None else mapping(meta, "meta")


def epochs_of(t_ns: Int64Array, start: int, interval_ns: int) -> Int64Array:
    """Return the epoch of each time, int64: epoch 0 begins at `start`, and those before it are negative."""
    epoch: Int64Array = np.clip((t_ns - start) // interval_ns, -MAX_EPOCHS - 1, MAX_EPOCHS)
    return epoch


def pages_of(bitmap: npt.NDArray[Any], name: str) -> npt.NDArray[np.uint64]:
    """Return the pages that are set in one bitmap, uint64, ascending; `name` is for the error."""
    if bitmap.ndim != 1 or (bitmap.dtype.str not in ("<u8", "<i8", "|u1", "|b1") and bitmap.size):
        raise TraceError(
            f"{name} is {bitmap.dtype} of shape {bitmap.shape}; it must be uint64 words, their uint8 bytes, "
            "or bool pages, in one dimension"
        )
    if bitmap.dtype == np.bool_:
        return np.flatnonzero(bitmap).astype(np.uint64)
    # Words without a page are left out first: they are most of a bitmap.
    words = np.flatnonzero(bitmap)
    bits = bitmap.dtype.itemsize * 8
    rows, column = np.nonzero(np.unpackbits(np.ascontiguousarray(bitmap[words])[:, None].view(np.uint8), axis=1, bitorder="little"))
    return (words[rows] * bits + column).astype(np.uint64)


def check_interval(interval_ns: int) -> None:
    """Refuse a length of an epoch that is no positive number of ns."""
    if not 0 < interval_ns < 1 << 53:
        raise TraceError(f"interval_ns is {interval_ns}; an epoch lasts from 1 ns to {(1 << 53) - 1} ns")


def _pages_in(bitmap: npt.NDArray[Any]) -> int:
    return len(bitmap) * (1 if bitmap.dtype == np.bool_ else bitmap.dtype.itemsize * 8)
