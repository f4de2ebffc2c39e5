"""Host memory behind memslots. One host a process: VMs that share a `Backing` share its pages."""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np

from spte import _arguments as arguments
from spte.arrays.records import U64s
from spte.arrays.reserve import Pool
from spte.errors import HostRangeError, OutOfTablesError, SlotAlignmentError, SlotRangeError
from spte.host import guest_memory
from spte.host import pages as hostmm
from spte.host.lock import ExclusiveLock
from spte.host.mmu_notifier import MmuNotifier, host_write
from spte.platform import PAGE_SIZE

_BLOCK = 2 << 20
_BLOCK_PAGES = _BLOCK // PAGE_SIZE
_GIB = 1 << 30
_CHUNK = 1 << 16  # blocks that are released together
_KINDS = {
    "4k": hostmm.SMALL, "thp": hostmm.THP, "hugetlb2m": hostmm.HUGETLB_2M, "hugetlb1g": hostmm.HUGETLB_1G, "shm": hostmm.SHM,
    "devdax2m": hostmm.HUGETLB_2M, "devdax1g": hostmm.HUGETLB_1G,
}  # fmt: skip
KINDS = tuple(_KINDS)

_space: Pool | None = None  # 1 GiB units of user address space
_allocating = threading.Lock()  # held while units are taken or given back


_backings: weakref.WeakValueDictionary[int, Backing] = weakref.WeakValueDictionary()  # by GiB of host address space, of one each


def _units() -> Pool:
    global _space
    if _space is None:
        _space = Pool(np.uint8, (hostmm.BLOCKS >> 9) - 1 - (hostmm.FIRST_BLOCK >> 9))
    return _space


# Ranges of backings that are gone. A finalizer may run at any allocation, also inside `Pool.take`: it must not touch the pool itself.
_gone: deque[tuple[int, int, int, int]] = deque()


def _release_gone() -> None:
    while _gone:
        _release(*_gone.popleft())


def _release(first_block: int, blocks: int, unit: int, units: int) -> None:
    h = hostmm.the_host()
    guest_memory.forget(first_block, blocks)
    for start in range(first_block, first_block + blocks, _CHUNK):
        end = min(start + _CHUNK, first_block + blocks)
        state = h.blocks["state"][start:end]
        if not state.any():  # EMPTY, and no memory is to be taken by writing that
            continue
        for block in start + np.flatnonzero(state == hostmm.MIXED):
            hostmm.drop_mixed(h, block, np.uint8(hostmm.EMPTY))
            h.alone[block] = 0
        h.alone[start + np.flatnonzero((state == hostmm.OWN) & (h.kinds[start:end] == hostmm.THP))] = 0
        h.blocks[start:end] = 0
    h.kinds[first_block : first_block + blocks] = hostmm.UNMAPPED
    _units().give(unit, units)


def backings_at(hva: int, size: int) -> tuple[Backing, ...]:
    """Return the backings that have some of the host addresses ``[hva, hva + size)``, by address."""
    gibs = range(hva // _GIB, (hva + size - 1) // _GIB + 1)
    found = dict.fromkeys(backing for gib in gibs if (backing := _backings.get(gib)) is not None)
    return tuple(backing for backing in found if hva < backing.hva + backing.size and backing.hva < hva + size)


def _end_mapping(hpage: int, end: int) -> None:
    """Put the pages before `hpage` and from `end` on in the blocks of the mapping ``[hpage, end)`` outside of it."""
    h = hostmm.the_host()
    for block in {hpage // _BLOCK_PAGES, (end - 1) // _BLOCK_PAGES}:
        first, last = max(hpage - block * _BLOCK_PAGES, 0), min(end - block * _BLOCK_PAGES, _BLOCK_PAGES)
        if last - first < _BLOCK_PAGES:
            row = int(hostmm.make_mixed(h, np.int64(block)))
            if row < 0:
                raise OutOfTablesError(f"no room for the page states of host block {block:#x}; close some backings")
            h.page[row, :first] = h.page[row, last:] = hostmm.PAGE_OUTSIDE
            h.mixed_blocks["own_pages"][row] = int((h.page[row] == hostmm.PAGE_OWN).sum())


def checked_size(kind: str, size: int) -> tuple[int, int]:
    """Return `size` and the page size of host memory of `kind`, bytes; TypeError or KvmError if there is no such memory."""
    if arguments.instance(kind, "kind", str, "a name") not in _KINDS:
        raise SlotAlignmentError(f"backing kind {arguments.spell(kind)} is not known; take one of {', '.join(KINDS)}")
    size = arguments.integer(size, "size", SlotRangeError)
    unit = _GIB if kind.endswith("1g") else _BLOCK if kind.endswith("2m") else PAGE_SIZE
    if size <= 0 or size % unit:
        raise SlotAlignmentError(f"size={size} of a {kind} backing is not a positive multiple of {unit}; round up")
    return size, unit


class Backing:
    """Host memory that memslots map, as one mapping of the host: what a memslot has beyond it is not there.

    Parameters
    ----------
    kind : str
        ``4k`` (no huge pages), ``thp``, ``hugetlb2m``, ``hugetlb1g``, ``shm``, ``devdax2m``, ``devdax1g``.
    size : int
        Bytes, a multiple of 4096; of the huge page for hugetlb and devdax.
    align : int, optional
        Alignment of the host virtual address, bytes, a power of two >= 4096; a small one is not exceeded, so ``align=4096`` gives
        memory that no huge page of the guest fits. Default: 2 MiB (1 GiB for 1 GiB pages).
    populate : bool
        Every page is written once beforehand. Memory of devdax is always populated.
    hva_offset : int
        Bytes that the host virtual address lies above a multiple of 1 GiB; takes the place of `align`.

    Raises
    ------
    SlotAlignmentError, SlotRangeError
        EINVAL: unknown kind, or size or alignment that such memory can not have.
    """

    def __init__(self, kind: str, size: int, *, align: int | None = None, populate: bool = False, hva_offset: int | None = None) -> None:
        size, unit = checked_size(kind, size)
        align = None if align is None else arguments.integer(align, "align", SlotAlignmentError)
        hva_offset = None if hva_offset is None else arguments.integer(hva_offset, "hva_offset", SlotAlignmentError)
        populate = arguments.flag(populate, "populate")
        if align is not None and (align < PAGE_SIZE or align & (align - 1)):
            raise SlotAlignmentError(f"align={align} is not a power of two of at least {PAGE_SIZE}")
        offset = hva_offset if hva_offset is not None else align if align is not None and align < _BLOCK else 0
        if offset % (unit if unit > PAGE_SIZE else PAGE_SIZE) or not 0 <= offset < _GIB:
            raise SlotAlignmentError(f"host address offset {offset} does not suit {kind} memory; take a multiple of {unit} below 1 GiB")
        self.kind, self.size = kind, size
        h = hostmm.the_host()
        units = (offset + size) // _GIB + 1  # there is always some address space behind it that is nobody's
        with _allocating:
            if units > len(_units().array):
                raise SlotRangeError(f"size={size} exceeds the user address space of {len(_units().array)} GiB")
            _release_gone()
            unit0 = _units().take(units)
        self.hva = ((hostmm.BLOCKS >> 9) - 1 - unit0 - units) * _GIB + offset  # from the top down, as mmap
        self._first_block, self._end_block = self.hva // _BLOCK, -(-(self.hva + size) // _BLOCK)
        end = self._end_block
        blocks = slice(self._first_block, end)
        h.kinds[blocks] = _KINDS[kind]
        if kind.startswith("devdax"):
            h.blocks["device"][blocks] = 1
        if kind == "thp":  # a block that sticks out of the mapping can not be huge
            if self.hva % _BLOCK:
                h.kinds[self._first_block] = hostmm.SMALL
            if (self.hva + size) % _BLOCK:
                h.kinds[end - 1] = hostmm.SMALL
        self.exclusive = ExclusiveLock(np.zeros(1, np.int64))  # the VMs' that map it, once they do
        weakref.finalize(self, _gone.append, (self._first_block, end - self._first_block, unit0, units)).atexit = False
        if populate or kind.startswith("devdax"):
            huge = (h.kinds[blocks] != hostmm.SMALL) & (h.kinds[blocks] != hostmm.SHM)
            h.blocks["state"][blocks] = np.where(huge, np.uint8(hostmm.HUGE), np.uint8(hostmm.OWN))
        _end_mapping(self.hpage, self.hpage + size // PAGE_SIZE)
        self.users: weakref.WeakSet[MmuNotifier] = weakref.WeakSet()
        for gib in range(self.hva // _GIB, self.hva // _GIB + units):
            _backings[gib] = self

    @property
    def hpage(self) -> int:
        """Host page number of the first byte: hva >> 12."""
        return self.hva // PAGE_SIZE

    def __repr__(self) -> str:
        return f"Backing({self.kind!r}, {self.size})"

    @property
    def huge_bytes(self) -> int:
        """Bytes that the host maps huge."""
        blocks = hostmm.the_host().blocks["state"][self._first_block : self._end_block]
        return int((blocks >= hostmm.HUGE).sum()) * _BLOCK

    def table(self, page: int) -> U64s:
        """Return the contents of page `page` as 512 words, to be read and written: memory that guest page tables lie in.

        Parameters
        ----------
        page : int
            Number of the page in this memory.

        Returns
        -------
        ndarray of uint64[512]
            A view; what is stored is what KVM reads from then on. Other pages read as zero.

        Raises
        ------
        SlotRangeError
            EINVAL: the page lies outside this memory.
        """
        page = arguments.integer(page, "page", SlotRangeError)
        if not 0 <= page < self.size // PAGE_SIZE:
            raise SlotRangeError(f"page {page} is outside {self!r} of {self.size // PAGE_SIZE} pages")
        return guest_memory.contents(self.hpage + page)

    def write(self, first: int, count: int) -> None:
        """Store into `count` pages from page `first` on, from userspace: never in a dirty log; zero pages are copied.

        Raises
        ------
        HostRangeError
            EINVAL: pages outside this memory; nothing is changed.
        """
        first, count = self.pages(first, count)
        for hpage in range(self.hpage + first, self.hpage + first + count):
            with self.exclusive:  # page by page, so that vCPUs run on
                host_write(self.users, hpage)

    def pages(self, first: int, count: int) -> tuple[int, int]:
        """Return pages of this memory as ints, if they are there.

        Parameters
        ----------
        first, count : int
            Pages.

        Returns
        -------
        tuple of int
            The same.

        Raises
        ------
        HostRangeError
            EINVAL: some lie outside this memory.
        """
        first, count = arguments.integer(first, "first", HostRangeError), arguments.integer(count, "count", HostRangeError)
        if first < 0 or count < 0 or (first + count) * PAGE_SIZE > self.size:
            raise HostRangeError(f"pages {first}..{first + count - 1} are outside {self!r} of {self.size // PAGE_SIZE} pages")
        return first, count
