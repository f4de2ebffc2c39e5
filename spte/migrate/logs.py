"""How the VMM learns which pages are dirty: bitmaps, bitmaps with CLEAR just before a page is sent, dirty rings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spte.migrate.guest import Guest
from spte.migrate.plan import Plan
from spte.migrate.playback import Int64Array
from spte.profile.rings import RingReader, masks
from spte.trace.build import pages_of

Words = npt.NDArray[np.uint64]


class Log:
    """A bitmap that GET takes and re-arms in one.

    Parameters
    ----------
    guest : Guest
        The guest whose memslot logs.
    plan : Plan
        Chunk of a CLEAR.
    """

    def __init__(self, guest: Guest, plan: Plan) -> None:
        self._guest, self._words = guest, -(-guest.npages // 64)
        self._chunk = plan.chunk_pages

    def harvest(self, *, running: bool = True) -> tuple[Words, float]:
        """Return the bitmap of the pages that are dirty, and how long that takes the VMM, ns; `running`: the guest runs meanwhile."""
        words, time = self._guest.call("get", self._get, words=self._words, masks=self._armed, running=running)
        return words, time.ns

    def _get(self) -> Words:
        return self._guest.vm.get_dirty_log(0)

    def _armed(self, words: Words) -> int:
        """Return how many words of the bitmap a GET arms again: all that it reports."""
        return int(np.count_nonzero(words))

    def chunks(self, pages: npt.NDArray[np.uint64]) -> list[tuple[int, npt.NDArray[np.uint64]]]:
        """Return `pages`, ascending, in the parts that are sent in one go, each with its first page."""
        return [(0, pages)]

    def before_send(self, first: int) -> float:
        """Do what comes before the part from page `first` on is sent; returns how long it takes the VMM, ns."""
        return 0.0


class ManualLog(Log):
    """A bitmap that GET leaves as it is; CLEAR takes the bits of a chunk and re-arms its pages before its first page is sent.

    As QEMU does it: only what a GET has shown is cleared, so that a page that was written since then stays dirty.
    """

    def __init__(self, guest: Guest, plan: Plan) -> None:
        super().__init__(guest, plan)
        self._shown = np.zeros(self._words, np.uint64)

    def harvest(self, *, running: bool = True) -> tuple[Words, float]:
        """Return the bitmap as GET shows it, and its time."""
        words, ns = super().harvest(running=running)
        self._shown = words.copy()
        return words, ns

    def _armed(self, words: Words) -> int:
        return 0

    def chunks(self, pages: npt.NDArray[np.uint64]) -> list[tuple[int, npt.NDArray[np.uint64]]]:
        """Return `pages` by chunk of CLEAR."""
        starts = np.arange(0, self._guest.npages, self._chunk)
        parts = np.split(pages, np.searchsorted(pages, starts[1:].astype(np.uint64)))
        return [(int(first), part) for first, part in zip(starts, parts, strict=True) if len(part)]

    def before_send(self, first: int) -> float:
        """Clear the chunk at `first`."""
        npages = min(self._chunk, self._guest.npages - first)
        shown = self._shown[first // 64 : -(-(first + npages) // 64)]
        if not shown.any():
            return 0.0
        armed = int(np.count_nonzero(shown))
        _, time = self._guest.call(
            "clear", lambda: self._guest.vm.clear_dirty_log(0, first, npages, shown), words=len(shown), masks=lambda _: armed
        )
        shown[:] = 0
        return time.ns


class RingLog(Log):
    """Dirty rings: their entries are taken at a harvest, and whenever a full one stops a vCPU."""

    def __init__(self, guest: Guest, plan: Plan) -> None:
        super().__init__(guest, plan)
        self._readers = [RingReader() for _ in guest.vm.vcpus]
        self._found = np.zeros(guest.npages, np.bool_)
        guest.reap = self._reap

    def harvest(self, *, running: bool = True) -> tuple[Words, float]:
        """Return the bitmap of what the rings held since the last harvest."""
        # With PML each vCPU is kicked for it, or pages would stay in its buffer.
        ns = self._reap(kicks=len(self._readers) if running and self._guest.vm.platform.pml else 0, running=running)
        words = np.zeros(self._words, np.uint64)
        packed = np.packbits(self._found, bitorder="little")
        words.view(np.uint8)[: len(packed)] = packed
        self._found[:] = False
        return words, ns

    def _reap(self, *, kicks: int = 0, running: bool = True) -> float:
        taken, collected = self._guest.call(
            "collect", self._collect, entries=lambda pages: sum(map(len, pages)), kicks=kicks, running=running
        )
        armed = sum(masks(pages) for pages in taken)
        _, reset = self._guest.call("reset", self._guest.vm.reset_dirty_rings, masks=lambda _: armed, running=running)
        return collected.ns + reset.ns

    def _collect(self) -> list[Int64Array]:
        vcpus = self._guest.vm.vcpus
        taken = [reader.take(vcpu.ring)["offset"].astype(np.int64) for reader, vcpu in zip(self._readers, vcpus, strict=True)]
        for pages in taken:
            self._found[pages] = True
        return taken


def log_of(guest: Guest, plan: Plan) -> Log:
    """Return the log that `plan` names."""
    kind = {"bitmap": Log, "ring": RingLog}.get(plan.log, ManualLog)
    return kind(guest, plan)


def pages_in(words: Words, npages: int) -> npt.NDArray[np.uint64]:
    """Return the pages that a bitmap of `npages` pages has, ascending."""
    pages = pages_of(words, "the dirty bitmap")
    return pages[: np.searchsorted(pages, np.uint64(npages))]
