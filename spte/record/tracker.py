"""One address space under the kernel's write tracking: arm what appears, read and re-arm what was written.

A scan costs what its page tables cost to walk. With the categories asked for here the kernel reads one entry a page; to tell pages
of files from others it would look at each page's own structure too, which is many times dearer, so that is asked only of the few
pages that a private mapping of a file reports.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os

import numpy as np

from spte.platform import PAGE_SIZE
from spte.record import abi
from spte.record.errors import MissingPieceError
from spte.record.maps import Mapping, read_mappings
from spte.record.ranges import RangeArray, merge

_VEC_LEN = 1 << 14
_IN_MEMORY = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED
_ANONYMOUS, _PRIVATE_FILE, _SHARED = range(3)


class MemoryGone(Exception):  # noqa: N818 - no error: an exec or exit comes at any time
    """The address space is no longer there: its process has exited or performed an exec."""


class Tracker:
    """The pages of one address space.

    Parameters
    ----------
    uffd : int
        A userfaultfd that the process made; this object closes it. When the last descriptor of it is closed the kernel makes every
        page writable again, however this process ends.
    pid : int
        The process.

    Raises
    ------
    MissingPieceError
        If the kernel lacks a feature, or the process's pagemap may not be read.
    MemoryGone
        If the process is gone.
    """

    def __init__(self, uffd: int, pid: int) -> None:
        self.pid, self._uffd = pid, uffd
        self._pagemap = -1
        self._vec = np.zeros((_VEC_LEN, 3), np.uint64)
        self._ready: set[Mapping] = set()
        """Shared mappings whose unpopulated pages are armed too."""
        self._failed: dict[Mapping, str] = {}
        self.refused: dict[str, str] = {}
        """Mappings that the kernel does not track, by name, and why."""
        try:
            abi.enable(uffd)
            self._pagemap = _open_pagemap(pid)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop tracking; every page is writable as before."""
        for descriptor in (self._uffd, self._pagemap):
            if descriptor >= 0:
                os.close(descriptor)
        self._uffd = self._pagemap = -1

    def scan(self) -> RangeArray:
        """Return the pages written since the last scan, and re-arm them; in the first, all that the process has in memory.

        Of a mapping that is new the pages in memory are returned: they were written since it appeared. In a new shared mapping they
        may have been read only.

        Returns
        -------
        int64 [n, 2]
            Ranges [start, end) of virtual page numbers, ascending, disjoint and not adjacent.

        Raises
        ------
        MemoryGone
            If the process has exited or performed an exec.
        """
        found = []
        for mappings, kind in self._register():
            if kind == _SHARED:
                found += self._arm_unpopulated(mappings)
            start, end = mappings[0].start, mappings[-1].end
            ranges = self._scan(start, end, written=True)
            if kind == _PRIVATE_FILE:
                # What was only read is still the file's page. It is armed now and will not be reported again.
                ranges = [part for s, e in itertools.chain.from_iterable(r.tolist() for r in ranges)
                          for part in self._scan(s * PAGE_SIZE, e * PAGE_SIZE, written=False, without=abi.PAGE_IS_FILE)]  # fmt: skip
            found += ranges
        return merge(found)

    def _register(self) -> list[tuple[list[Mapping], int]]:
        """Register all mappings, and return them as runs of neighbours of one kind.

        Every one is registered at every scan, as a mapping that was unmapped and mapped again at its place looks the same but is not
        tracked; where nothing changed the call does nothing.
        """
        failed: dict[Mapping, str] = {}
        tracked = []
        for run in _runs(read_mappings(self.pid)):
            try:
                self._call_register(run[0].start, run[-1].end)
                tracked += run
            except OSError:
                for mapping in run:
                    try:
                        self._call_register(mapping.start, mapping.end)
                        tracked.append(mapping)
                    except OSError as error:
                        failed[mapping] = str(error.strerror)
        # A mapping that goes while it is registered fails once; one that fails twice is refused.
        self.refused |= {m.name or f"{m.start:#x}": why for m, why in failed.items() if m in self._failed}
        self._failed = failed
        return [(run, _kind(run[0])) for run in _runs(tracked, by_kind=True)]

    def _call_register(self, start: int, end: int) -> None:
        try:
            abi.register(self._uffd, start, end)
        except OSError as error:
            if error.errno == errno.ENOMEM and not abi.has_memory(self._uffd):
                raise MemoryGone from None
            raise

    def _arm_unpopulated(self, mappings: list[Mapping]) -> list[RangeArray]:
        """Arm the unpopulated pages of new shared mappings: else a page that is read in later would pass for written.

        A mapping larger than the host's memory keeps that flaw: the page tables for it might be large.
        """
        found = []
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for mapping in mappings:
            if mapping in self._ready or mapping.end - mapping.start > limit:
                continue
            self._ready.add(mapping)
            try:
                abi.write_protect(self._uffd, mapping.start, mapping.end)
            except OSError as error:
                if error.errno == errno.ESRCH:
                    raise MemoryGone from None
                continue  # it changes just now: its pages come by the scan
            found += self._scan(mapping.start, mapping.end, written=False, where=abi.PAGE_IS_PRESENT)  # the armed holes are swap entries
        return found

    def _scan(self, start: int, end: int, *, written: bool, where: int = _IN_MEMORY, without: int = 0) -> list[RangeArray]:
        """Return the pages of the bytes [start, end) of any category in `where` and none in `without`.

        With `written` only those that were written, which are armed again. The page of zeros that a read of new memory maps is none.
        """
        inverted = abi.PAGE_IS_PFNZERO | without
        wanted = inverted | (abi.PAGE_IS_WPALLOWED | abi.PAGE_IS_WRITTEN if written else 0)
        argument = abi.PmScanArg(
            size=ctypes.sizeof(abi.PmScanArg), flags=abi.PM_SCAN_WP_MATCHING if written else 0, end=end, vec=self._vec.ctypes.data,
            vec_len=_VEC_LEN, category_inverted=inverted, category_mask=wanted, category_anyof_mask=where,
        )  # fmt: skip
        found = []
        while start < end:
            argument.start = start
            count = abi.pagemap_scan(self._pagemap, argument)
            if count:
                found.append((self._vec[:count, :2] // np.uint64(PAGE_SIZE)).astype(np.int64))
            start = argument.walk_end
        return found


def _open_pagemap(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise MissingPieceError(f"/proc/{pid}/pagemap: {error.strerror}; run as the user of the process or as root") from None
    except (FileNotFoundError, ProcessLookupError):
        raise MemoryGone from None


def _kind(mapping: Mapping) -> int:
    return _SHARED if mapping.shared else _PRIVATE_FILE if mapping.file else _ANONYMOUS


def _runs(mappings: list[Mapping], *, by_kind: bool = False) -> list[list[Mapping]]:
    """Group mappings that lie one behind the other without a gap."""
    runs: list[list[Mapping]] = []
    for mapping in mappings:
        if runs and runs[-1][-1].end == mapping.start and not (by_kind and _kind(runs[-1][-1]) != _kind(mapping)):
            runs[-1].append(mapping)
        else:
            runs.append([mapping])
    return runs
