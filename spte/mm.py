"""What host userspace does to its memory: madvise, mprotect, fork, soft-dirty. Each calls the MMU notifiers, then changes the pages.

A notifier range drops every SPTE that maps a page of it, in every VM, and never touches a dirty log.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from spte import _arguments as arguments
from spte.errors import HostRangeError
from spte.host import pages as hostmm
from spte.host.backing import Backing
from spte.host.lock import all_of
from spte.host.mmu_notifier import Ranges, clear_young, invalidate_range
from spte.host.pages import the_host

DONTNEED, FREE, COLD, PAGEOUT = 4, 8, 20, 21
PROT_READ, PROT_READ_WRITE = 1, 3
_PROTECT = {hostmm.EMPTY: hostmm.EMPTY_RO, hostmm.HUGE: hostmm.HUGE_RO, hostmm.HUGE_WP: hostmm.HUGE_WP_RO}  # mprotect of a whole block
_UNPROTECT = {protected: state for state, protected in _PROTECT.items()}
_BLOCK_PAGES = 512


def _pages_of(backing: Backing, first: int, count: int) -> tuple[int, int]:
    return arguments.instance(backing, "backing", Backing, "a Backing").pages(first, count)


def _blocks(hpage: int, count: int) -> Iterable[tuple[int, int, int]]:
    """Yield ``(block, first page in it, end page in it)`` of a range of host pages."""
    for block in range(hpage >> 9, ((hpage + count - 1) >> 9) + 1 if count else hpage >> 9):
        yield block, max(hpage - (block << 9), 0), min(hpage + count - (block << 9), _BLOCK_PAGES)


def _check_huge(backing: Backing, first: int, count: int) -> None:
    """Refuse ranges that cut a huge page of memory that has no others."""
    unit = {"2m": 512, "1g": 512 * 512}.get(backing.kind[-2:], 1)
    if first % unit or count % unit:
        raise HostRangeError(f"pages {first}..{first + count - 1} cut a huge page of {backing!r}; take multiples of {unit} pages")


def _is_huge(block: int) -> bool:
    return int(the_host().blocks["state"][block]) >= hostmm.HUGE


def _split_partial(hpage: int, count: int) -> Ranges:
    """Return the blocks that are mapped huge and meet the range only in part: the host splits those, with a notifier each."""
    return [(block << 9, _BLOCK_PAGES) for block, a, b in _blocks(hpage, count) if b - a < _BLOCK_PAGES and _is_huge(block)]


def _pages(block: int) -> npt.NDArray[np.uint8]:
    """Return the states of the single pages of `block`, which becomes MIXED; to be followed by `_settle`."""
    h = the_host()
    row = int(hostmm.make_mixed(h, np.int64(block)))
    if row < 0:
        raise HostRangeError(f"no room for the page states of host block {block:#x}; close some backings")
    states: npt.NDArray[np.uint8] = h.page[row]
    return states


def _settle(block: int) -> None:
    """Bring the count of a MIXED block in step with its pages; all own: the block is OWN."""
    h = the_host()
    row = int(h.blocks["row"][block])
    h.mixed_blocks["own_pages"][row] = int((h.page[row] == hostmm.PAGE_OWN).sum())
    if h.mixed_blocks["own_pages"][row] == _BLOCK_PAGES:
        hostmm.drop_mixed(h, np.int64(block), np.uint8(hostmm.OWN))


def madvise(backing: Backing, first: int, count: int, advice: int = DONTNEED, *, ages: bool = False) -> None:
    """Advise on pages ``[first, first + count)`` of `backing`; mutates host pages and drops SPTEs as the kernel does.

    Parameters
    ----------
    backing : Backing
        The memory.
    first, count : int
        Pages.
    advice : int
        4 DONTNEED, 8 FREE, 20 COLD, 21 PAGEOUT (there is no swap).
    ages : bool
        PAGEOUT ages the pages (policy field ``pageout``).

    Raises
    ------
    HostRangeError
        EINVAL: pages outside the backing or parts of hugetlb pages, advice that is not known or not for such memory; nothing is changed.
    """
    first, count = _pages_of(backing, first, count)
    ages = arguments.flag(ages, "ages")
    if arguments.index(advice, "advice") not in (DONTNEED, FREE, COLD, PAGEOUT):
        raise HostRangeError(f"advice={arguments.spell(advice)} is not 4 (DONTNEED), 8 (FREE), 20 (COLD) or 21 (PAGEOUT)")
    _check_huge(backing, first, count)
    if advice != DONTNEED and (backing.kind.startswith(("hugetlb", "devdax")) or (backing.kind == "shm" and advice == FREE)):
        raise HostRangeError(f"advice={advice} is not for {backing.kind} memory; take 4 (DONTNEED)")
    with backing.exclusive:
        _advise(backing, backing.hpage + first, count, advice, ages)


def _advise(backing: Backing, hpage: int, count: int, advice: int, ages: bool) -> None:
    split = _split_partial(hpage, count)
    zapped = [(hpage, count)] if advice in (DONTNEED, FREE) else []
    for part in [*zapped, *split]:
        invalidate_range(backing.users, [part])
    for block, _ in split:
        _pages(block >> 9)
        _settle(block >> 9)
    if advice == PAGEOUT and ages:
        clear_young(backing.users, hpage, count)
    if advice != DONTNEED:
        return
    h = the_host()
    for block, a, b in _blocks(hpage, count):
        state, kind = int(h.blocks["state"][block]), int(h.kinds[block])
        if b - a == _BLOCK_PAGES and (_is_huge(block) or (state == hostmm.OWN and kind != hostmm.THP)):
            h.blocks["state"][block] = hostmm.EMPTY if state in (hostmm.HUGE, hostmm.HUGE_WP, hostmm.OWN) else hostmm.EMPTY_RO
        elif state not in (hostmm.EMPTY, hostmm.EMPTY_RO):
            pages = _pages(block)
            pages[a:b] = (pages[a:b] & hostmm.PROTECTED) | hostmm.PAGE_NONE
            _settle(block)
            h.alone[block] |= _bits(a, b) if kind == hostmm.THP else np.uint64(0)


def _bits(first: int, end: int) -> npt.NDArray[np.uint64]:
    """Return 512 bits, those of ``[first, end)`` set, as 8 words."""
    bits = np.zeros(_BLOCK_PAGES, np.uint8)
    bits[first:end] = 1
    return np.packbits(bits, bitorder="little").view(np.uint64)


def _protection(hpage: int, count: int) -> npt.NDArray[np.bool_]:
    """Tell of each page whether mprotect has taken writing from it."""
    h = the_host()
    blocks = np.arange(hpage >> 9, ((hpage + count - 1) >> 9) + 1)
    protected = np.isin(h.blocks["state"][blocks], tuple(_UNPROTECT))[:, None].repeat(_BLOCK_PAGES, axis=1)
    for i in np.flatnonzero(h.blocks["state"][blocks] == hostmm.MIXED):
        protected[i] = h.page[h.blocks["row"][blocks[i]]] & hostmm.PROTECTED != 0
    return protected.reshape(-1)[hpage & 511 :][:count]


def _mappings(hpage: int, count: int) -> list[tuple[int, int, bool]]:
    """Return ``(first page, pages, protected)`` of each run of equal protection: what the host keeps as one mapping."""
    protected = _protection(hpage, count)
    edges = [0, *(np.flatnonzero(protected[1:] != protected[:-1]) + 1).tolist(), count]
    return [(hpage + a, b - a, bool(protected[a])) for a, b in itertools.pairwise(edges) if a < b]


def _cut(backing: Backing, edge: int) -> None:
    """Cut a mapping in two before host page `edge`; inside an aligned 2 MiB block of one mapping, all of that block is unmapped."""
    block, end = edge & ~511, backing.hpage + backing.size // 4096
    inside = backing.hpage <= block < edge and block + _BLOCK_PAGES <= end
    if inside and len(_mappings(block, _BLOCK_PAGES)) == 1:
        invalidate_range(backing.users, [(block, _BLOCK_PAGES)])
        if _is_huge(block >> 9):
            _pages(block >> 9)
            _settle(block >> 9)


def mprotect(backing: Backing, first: int, count: int, prot: int = PROT_READ_WRITE, *, restores: bool = True) -> None:
    """Change the protection of pages; mutates host pages, drops SPTEs.

    Parameters
    ----------
    backing : Backing
        The memory.
    first, count : int
        Pages.
    prot : int
        1 read, 3 read and write.
    restores : bool
        Own pages are writable at once again; else their next write copies them (policy field ``mprotect_restores``).

    Raises
    ------
    HostRangeError
        EINVAL: pages outside the backing, or a protection that is not known; nothing is changed.
    """
    first, count = _pages_of(backing, first, count)
    restores = arguments.flag(restores, "restores")
    if arguments.index(prot, "prot") not in (PROT_READ, PROT_READ_WRITE):
        raise HostRangeError(f"prot={arguments.spell(prot)} is not 1 (read) or 3 (read and write)")
    _check_huge(backing, first, count)
    protect = prot == PROT_READ
    with backing.exclusive:
        for start, pages, protected in _mappings(backing.hpage + first, count):
            if protected != protect:
                _cut(backing, start)
                _cut(backing, start + pages)
                invalidate_range(backing.users, [(start, pages)])
                _set_protection(start, pages, protect, restores)


def _set_protection(hpage: int, count: int, protect: bool, restores: bool) -> None:
    h = the_host()
    back = _UNPROTECT if restores else _UNPROTECT | {hostmm.HUGE_RO: hostmm.HUGE_WP}
    for block, a, b in _blocks(hpage, count):
        state = int(h.blocks["state"][block])
        empty = state == hostmm.EMPTY and h.kinds[block] in (hostmm.SMALL, hostmm.SHM)
        known = _PROTECT if protect else back
        if b - a == _BLOCK_PAGES and state in known and not empty:
            h.blocks["state"][block] = known[state]
            continue
        pages = _pages(block)
        pages[a:b] = pages[a:b] | hostmm.PROTECTED if protect else pages[a:b] & ~np.uint8(hostmm.PROTECTED)
        if not protect and not restores:
            pages[a:b][pages[a:b] == hostmm.PAGE_OWN] = hostmm.PAGE_COPY
        _settle(block)


def _write_protect(backing: Backing) -> None:
    """Write-protect every own page, as fork and soft-dirty do: the next write finds it shared with nobody."""
    h = the_host()
    for block, a, b in _blocks(backing.hpage, backing.size // 4096):
        state = int(h.blocks["state"][block])
        if state in (hostmm.HUGE, hostmm.HUGE_RO):
            h.blocks["state"][block] = hostmm.HUGE_WP if state == hostmm.HUGE else hostmm.HUGE_WP_RO
        elif state in (hostmm.OWN, hostmm.MIXED):
            pages = _pages(block)
            part = pages[a:b]
            part[part & 3 == hostmm.PAGE_OWN] += np.uint8(hostmm.PAGE_WP - hostmm.PAGE_OWN)
            _settle(block)


def _all(backings: Iterable[Backing]) -> list[Backing]:
    given = arguments.items(backings, "backings", "a list of Backing")
    return [arguments.instance(backing, "backing", Backing, "a Backing") for backing in given]


def fork(backings: Iterable[Backing]) -> None:
    """Fork a process that has `backings`; the child exits at once. Private pages are write-protected; one notifier a mapping."""
    private = [backing for backing in _all(backings) if backing.kind != "shm" and not backing.kind.startswith("devdax")]
    with all_of(*(backing.exclusive for backing in private)):
        for backing in private:
            for start, pages, _ in _mappings(backing.hpage, backing.size // 4096):
                invalidate_range(backing.users, [(start, pages)])
            _write_protect(backing)


def clear_refs(backings: Iterable[Backing]) -> None:
    """Write 4 to clear_refs (soft-dirty) of a process that has `backings`: every page is write-protected under one notifier."""
    known = _all(backings)
    with all_of(*(backing.exclusive for backing in known)):
        users = {user for backing in known for user in backing.users}
        invalidate_range(users, [(backing.hpage, backing.size // 4096) for backing in known])
        for backing in known:
            if not backing.kind.startswith(("hugetlb", "devdax")):
                _write_protect(backing)
