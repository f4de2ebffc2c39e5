"""The host's side of a page: is it there, may it be written, how large is its mapping.

Host page numbers (hva >> 12, which are also the model's pfns) index 2 MiB blocks. A block is in one state as a whole, or
MIXED with a state a page; so memory grows with what is irregular, not with the guest. A block that a mapping covers in part
is MIXED as long as the mapping lasts: its other pages are PAGE_OUTSIDE, and never all are its own or mapped huge.

| block state | meaning |
|---|---|
| EMPTY | no page was touched |
| OWN | every page is there, writable, mapped at 4 KiB |
| MIXED | look at the page |
| EMPTY_RO | EMPTY, mprotect(PROT_READ), of memory that may be huge |
| HUGE | mapped huge and writable |
| HUGE_WP | mapped huge, write-protected (fork, soft-dirty) |
| HUGE_RO, HUGE_WP_RO | the same two, mprotect(PROT_READ) |
"""

from __future__ import annotations

import threading

import numpy as np

from spte._numba.atomics import relax, store, swap
from spte._numba.jit import helper, kernel, kernel_noinline_entry
from spte.arrays import reserve as memory
from spte.arrays.host import BLOCK, HOST_ROWS, MIXED_BLOCK, Host
from spte.bits import ALL_ONES, ZERO

UNMAPPED, SMALL, THP, HUGETLB_2M, HUGETLB_1G, SHM = 0, 1, 2, 3, 4, 5  # kinds of memory of a block
EMPTY, OWN, MIXED, EMPTY_RO = 0, 1, 2, 3
HUGE, HUGE_WP, HUGE_RO, HUGE_WP_RO = 4, 5, 6, 7  # from HUGE on: mapped huge
PAGE_NONE, PAGE_OWN, PAGE_ZERO, PAGE_WP = 0, 1, 2, 3
PAGE_COPY = 4  # own, write-protected by an old mprotect: the next write copies it
PROTECTED = 0x80  # mprotect(PROT_READ), beside the state of a page
PAGE_OUTSIDE = PROTECTED | 0x40  # of no mapping: every access is refused. Shares PROTECTED's test, so that other pages pay none
HOST_OK, HOST_COW, HOST_EFAULT, HOST_NOMEM = 0, 1, 2, 3

BLOCKS = 1 << 26  # 2**47 bytes of user address space in 2 MiB blocks
FIRST_BLOCK = 1 << 15  # below it, pfns name rows of the arena
ZERO_PFN = np.uint64(FIRST_BLOCK << 9)
MIXED_ROWS = 1 << 20
WORDS_BLOCKS, WORDS_PAGES = 1 << 16, 1 << 20


_host: Host | None = None
_first_use = threading.Lock()


def the_host() -> Host:
    """Return this process's host memory, made at the first call: a real host has one too, and VMs may share pages."""
    global _host
    if _host is None:
        with _first_use:
            _host = _host or _new_host()
    return _host


def _new_host() -> Host:
    res = memory.reserve
    return Host(
        kinds=res(np.uint8, BLOCKS), blocks=res(BLOCK, BLOCKS), rows=np.zeros(1, HOST_ROWS), rows_lock=np.zeros(1, np.int64),
        pages_lock=np.zeros(1, np.int64), mixed_blocks=res(MIXED_BLOCK, MIXED_ROWS), page=res(np.uint8, MIXED_ROWS, 512),
        alone=res(np.uint64, BLOCKS, 8),
        words_page=res(np.int32, WORDS_BLOCKS, 512), words=res(np.uint64, WORDS_PAGES, 512),
    )  # fmt: skip


@helper
def spin_lock(word):
    """Wait until no other thread holds the lock, and take it."""
    while swap(word, 0, 1) != 0:
        relax()


@helper
def spin_unlock(word):
    """Give the lock back."""
    store(word, 0, 0)


@helper
def _take_row(h):
    """Return a row of `page` that nobody has, -1 if there is none."""
    spin_lock(h.rows_lock)
    row = np.int64(h.rows[0].free - 1)
    if row >= 0:
        h.rows[0].free = h.mixed_blocks[row].next_free
    elif h.rows[0].used < h.mixed_blocks.shape[0]:
        row = np.int64(h.rows[0].used)
        h.rows[0].used = row + 1
    spin_unlock(h.rows_lock)
    return row


@kernel_noinline_entry
def make_mixed(h, block):
    """Give `block` a state a page, all as the block was; returns the row, -1 if there is none."""
    if h.blocks[block].state == MIXED:
        return np.int64(h.blocks[block].row)
    row = _take_row(h)
    if row < 0:
        return row
    was = h.blocks[block].state
    state = PAGE_OWN
    if was == EMPTY or was == EMPTY_RO:
        state = PAGE_NONE
    elif was == HUGE_WP or was == HUGE_WP_RO:
        state = PAGE_WP
    if was == EMPTY_RO or was == HUGE_RO or was == HUGE_WP_RO:
        state |= PROTECTED
    for i in range(512):
        h.page[row, i] = state
    h.mixed_blocks[row].own_pages = 512 if state == PAGE_OWN else 0
    if h.kinds[block] == THP and (was == EMPTY or was == EMPTY_RO):
        for w in range(8):
            h.alone[block, w] = ALL_ONES
    h.blocks[block].row = row
    h.blocks[block].state = MIXED
    return row


@kernel_noinline_entry
def drop_mixed(h, block, state):
    """Put the whole block into `state`; its row of single pages, if any, is given back."""
    if h.blocks[block].state == MIXED:
        row = np.int64(h.blocks[block].row)
        spin_lock(h.rows_lock)
        h.mixed_blocks[row].next_free = h.rows[0].free
        h.rows[0].free = row + 1
        spin_unlock(h.rows_lock)
    h.blocks[block].state = state


@kernel
def set_page(h, block, row, i, state):
    """Put one page of a MIXED block into `state`; a block whose pages are all own becomes OWN."""
    h.mixed_blocks[row].own_pages += np.int32(state == PAGE_OWN) - np.int32(h.page[row, i] == PAGE_OWN)
    h.page[row, i] = state
    if h.mixed_blocks[row].own_pages == 512:
        drop_mixed(h, block, OWN)


@helper
def host_level(h, hpage):
    """Return the level at which the host maps `hpage`: 3, 2, or 1 (also when absent)."""
    if h.blocks[hpage >> 9].state < HUGE:
        return np.int64(1)
    return np.int64(3 if h.kinds[hpage >> 9] == HUGETLB_1G else 2)


@helper
def writable_now(h, hpage):
    """Tell whether the host maps `hpage` writable already."""
    state = h.blocks[hpage >> 9].state
    if state == MIXED:
        return h.page[h.blocks[hpage >> 9].row, hpage & 511] == PAGE_OWN
    return state == OWN or state == HUGE


@helper
def fault_in_huge(h, block, kind, state):
    """Map an empty block huge, in `state`; 1 GiB pages come whole."""
    if kind == HUGETLB_1G:
        first = block & ~np.int64(511)
        for b in range(first, first + 512):
            h.blocks[b].state = state
    else:
        h.blocks[block].state = state
        for w in range(8):
            h.alone[block, w] = ZERO


@kernel
def host_fault(h, hpage, write):
    """Make the host map `hpage` as an access needs it; returns ``(code, writable, zero)``.

    HOST_COW: the host must copy the page, most often the zero page, with a notifier; the caller lets `spte.host.backing` do
    it and asks again.
    """
    block = hpage >> 9
    kind = h.kinds[block]
    state = h.blocks[block].state
    if kind == UNMAPPED:
        return HOST_EFAULT, False, False
    if state == HUGE or state == OWN:
        return HOST_OK, True, False
    if state == HUGE_WP:
        if write:
            h.blocks[block].state = HUGE
        return HOST_OK, write, False
    if state == EMPTY_RO and not write:
        fault_in_huge(h, block, kind, HUGE_RO)
    if state == EMPTY_RO or state > HUGE_WP:
        return HOST_EFAULT if write else HOST_OK, False, False
    if state == EMPTY and (kind == THP or kind == HUGETLB_2M or kind == HUGETLB_1G):
        fault_in_huge(h, block, kind, HUGE)
        return HOST_OK, True, False
    row = make_mixed(h, block)
    if row < 0:
        return HOST_NOMEM, False, False
    i = hpage & 511
    page = h.page[row, i]
    if page & PROTECTED:
        if write or page == PAGE_OUTSIDE:
            return HOST_EFAULT, False, False
        if page == PROTECTED | PAGE_NONE and kind != SHM:
            h.page[row, i] = PROTECTED | PAGE_ZERO
        return HOST_OK, False, (h.page[row, i] & 3) == PAGE_ZERO
    if page == PAGE_OWN:
        return HOST_OK, True, False
    if write and (page == PAGE_ZERO or page == PAGE_COPY):
        return HOST_COW, False, False
    if write or (page == PAGE_NONE and kind == SHM):
        set_page(h, block, row, i, PAGE_OWN)
        return HOST_OK, True, False
    if page == PAGE_NONE:
        h.page[row, i] = PAGE_ZERO
    return HOST_OK, False, page == PAGE_NONE or page == PAGE_ZERO


def write_page(hpage: np.int64) -> int:
    """Store into a host page from the host itself; HOST_COW: the page was copied, which needs the unmap notifier."""
    h = the_host()
    code, _, _ = host_fault(h, hpage, True)
    if code == HOST_COW:
        set_page(h, hpage >> 9, np.int64(h.blocks["row"][hpage >> 9]), hpage & 511, np.uint8(PAGE_OWN))
    return int(code)
