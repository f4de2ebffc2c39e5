"""What a trace says about dirtying: rates, working sets, and dirty pages against the length of an interval."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from spte.platform import PAGE_SIZE
from spte.trace.model import PAGES_PER_2M, Int64Array, Trace

WORKING_SET_S = 1.0
"""The working set is of the last second: about the time that a round of pre-copy takes."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """Intervals of `epochs` epochs each, `seconds` long: `pages`, how many distinct ones are dirty in one, in the mean."""

    epochs: int
    seconds: float
    pages: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of a trace.

    Parameters
    ----------
    pages : int
        Pages of the guest.
    epochs : int
        Number of epochs.
    seconds : float
        Time of all epochs together.
    writes : int
        Page writes: a page counts once in each epoch that wrote it.
    touched : int
        Distinct pages that any epoch wrote.
    regions : int
        2 MiB regions that any epoch wrote.
    peak_epoch : int
        The epoch with the most pages.
    peak_pages : int
        How many it wrote.
    idle_epochs : int
        Epochs without a write.
    working_set_pages : int
        Distinct pages that the last second (`WORKING_SET_S`) wrote, in the median over the epochs.
    intervals : list of Interval
        Dirty pages against the length of an interval: 1, 2, 4, ... epochs.
    """

    pages: int
    epochs: int
    seconds: float
    writes: int
    touched: int
    regions: int
    peak_epoch: int
    peak_pages: int
    idle_epochs: int
    working_set_pages: int
    intervals: list[Interval]

    @property
    def dirty_rate(self) -> float:
        """Bytes of pages dirtied each second; 0 if the trace knows no time."""
        return self.writes * PAGE_SIZE / self.seconds if self.seconds else 0.0


def summarize(trace: Trace) -> Summary:
    """Return the figures of `trace`."""
    sizes = np.diff(trace.indptr)
    epoch = epoch_of_write(trace)
    before = previous_epoch(trace)
    return Summary(
        pages=trace.npages,
        epochs=trace.nepochs,
        seconds=trace.duration_ns / 1e9,
        writes=trace.writes,
        touched=int(np.count_nonzero(before < 0)),
        regions=len(np.unique(trace.gfn // np.asarray(PAGES_PER_2M, trace.gfn.dtype))),
        peak_epoch=int(sizes.argmax()),
        peak_pages=int(sizes.max()),
        idle_epochs=int(np.count_nonzero(sizes == 0)),
        working_set_pages=int(np.median(working_set(trace, before, window_epochs(trace)))),
        intervals=[_interval(trace, epoch, before, length) for length in _lengths(trace.nepochs)],
    )


def epoch_of_write(trace: Trace) -> Int64Array:
    """Return the epoch of each page write, int64 [writes]."""
    return np.repeat(np.arange(trace.nepochs), np.diff(trace.indptr))


def previous_epoch(trace: Trace) -> Int64Array:
    """Return for each page write the epoch that wrote that page before, int64 [writes]; -1: none did."""
    order = np.argsort(trace.gfn, kind="stable")
    gfn, epoch = trace.gfn[order], epoch_of_write(trace)[order]
    before = np.full(trace.writes, -1, np.int64)
    again = np.flatnonzero(gfn[1:] == gfn[:-1]) + 1
    before[order[again]] = epoch[again - 1]
    return before


def working_set(trace: Trace, before: Int64Array, window: int) -> Int64Array:
    """Return for each epoch the distinct pages that it and the `window` - 1 epochs before it wrote, int64 [epochs].

    `before` is `previous_epoch(trace)`.
    """
    epoch = epoch_of_write(trace)
    # A page counts from its write on, unless it counts still, until `window` epochs after it; a later write puts that off.
    change = np.zeros(trace.nepochs + window + 1, np.int64)
    stays = (before >= 0) & (epoch - before < window)
    np.add.at(change, epoch, ~stays)
    np.add.at(change, epoch + window, -1)
    np.add.at(change, before[stays] + window, 1)
    return np.cumsum(change)[: trace.nepochs]


def window_epochs(trace: Trace) -> int:
    """Return how many epochs the working set's time has, at least 1 and at most all."""
    mean_ns = trace.duration_ns / trace.nepochs
    return trace.nepochs if not mean_ns else max(1, min(trace.nepochs, round(WORKING_SET_S * 1e9 / mean_ns)))


def _lengths(nepochs: int) -> list[int]:
    powers = [1 << bit for bit in range(nepochs.bit_length())]
    return powers if powers[-1] == nepochs else [*powers, nepochs]


def _interval(trace: Trace, epoch: Int64Array, before: Int64Array, length: int) -> Interval:
    whole = trace.nepochs // length
    first: npt.NDArray[np.bool_] = (before < 0) | (before // length != epoch // length)
    pages = np.count_nonzero(first[: trace.indptr[whole * length]]) / whole
    return Interval(length, int(trace.t_ns[whole * length] - trace.t_ns[0]) / whole / 1e9, float(pages))
