"""A trace's writes against the clocks of vCPUs: which pages a vCPU writes until its own time reaches some instant.

A vCPU's time is counted in `TICKS` a nanosecond, so that one that runs for a share of each nanosecond, in percent, has a whole number of
them. It stands still while the vCPU sleeps, and goes on beyond the end of the trace, which then begins anew or has ended.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from spte.profile.workload import Gfns, TraceWorkload

Int64Array = npt.NDArray[np.int64]
TICKS = 100
"""A vCPU's time in one ns of running at full speed."""


class Writes:
    """The writes of a workload by epoch and vCPU, and when they are: evenly spread over the epoch.

    Parameters
    ----------
    work : TraceWorkload
        The workload; nothing of it is changed.
    """

    def __init__(self, work: TraceWorkload) -> None:
        self._work = work
        self.bounds = (work.t_ns - work.t_ns[0]) * TICKS
        self.epoch = functools.lru_cache(maxsize=4)(self._epoch)

    def _epoch(self, index: int) -> list[tuple[Int64Array, Gfns]]:
        """Return for each vCPU the instants of its writes in epoch `index`, int64 ticks since the trace began, and the gfns."""
        dealt: list[list[Gfns]] = [[np.empty(0, np.uint64)] for _ in range(self._work.vcpus)]
        for access in self._work.epoch(index):
            dealt[access.vcpu].append(access.gfns)
        start, length = int(self.bounds[index]), int(self.bounds[index + 1] - self.bounds[index])
        result = []
        for gfns in map(np.concatenate, dealt):
            n = len(gfns)
            # Half a distance before the first and after the last. The quotient first: the product does not fit 64 bits for long epochs.
            step, rest = divmod(length, 2 * n) if n else (0, 0)
            odd = 2 * np.arange(n, dtype=np.int64) + 1
            result.append((start + odd * step + odd * rest // max(1, 2 * n), gfns))
        return result


class Playback:
    """One vCPU's place in the writes.

    Parameters
    ----------
    writes : Writes
        The writes of all vCPUs.
    vcpu : int
        Which of them.
    repeat : bool
        The trace begins anew at its end; else the vCPU writes no more.
    """

    def __init__(self, writes: Writes, vcpu: int, *, repeat: bool) -> None:
        self._writes, self._vcpu, self._repeat = writes, vcpu, repeat
        self._lap, self._epoch, self._at = 0, 0, 0

    def until(self, ticks: int) -> tuple[Int64Array, Gfns]:
        """Return the writes since the last call that come before `ticks` of the vCPU's time: their instants, int64, and gfns, uint64."""
        bounds, last = self._writes.bounds, len(self._writes.bounds) - 2
        instants, pages = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        while True:
            began = self._lap * int(bounds[-1])
            times, gfns = self._writes.epoch(self._epoch)[self._vcpu]
            end = int(np.searchsorted(times, ticks - began))
            if end > self._at:
                instants.append(times[self._at : end] + began)
                pages.append(gfns[self._at : end])
                self._at = end
            if began + int(bounds[self._epoch + 1]) >= ticks or (self._epoch == last and not self._repeat):
                return np.concatenate(instants), np.concatenate(pages)
            self._epoch, self._at = self._epoch + 1, 0
            if self._epoch > last:
                self._lap, self._epoch = self._lap + 1, 0
