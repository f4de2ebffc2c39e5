"""Contents of the guest pages that hold page tables: all that KVM reads of a guest's memory. Other pages read as zero."""

from __future__ import annotations

import threading

import numpy as np

from spte._numba.jit import helper
from spte.arrays.records import U64s
from spte.bits import ZERO
from spte.errors import OutOfTablesError
from spte.host import pages as hostmm

_free_blocks: list[int] = []
_free_pages: list[int] = []
_allocating = threading.Lock()  # held while rows are taken or given back: VMs on other threads have theirs from the same arrays
_used = [0, 0]  # rows of `words_page` and of `words` that were ever taken


@helper
def words_row(h, hpage):
    """Return the row of `words` with the contents of `hpage`, -1 if it has none."""
    block = np.int64(h.blocks[hpage >> 9].words)
    if block == 0:
        return np.int64(-1)
    return np.int64(h.words_page[block - 1, hpage & 511]) - 1


@helper
def read_word(h, hpage, i):
    """Return 64-bit word `i` of `hpage`."""
    row = words_row(h, hpage)
    return ZERO if row < 0 else h.words[row, i]


@helper
def write_word(h, hpage, i, value):
    """Set 64-bit word `i` of `hpage`, if its contents are kept."""
    row = words_row(h, hpage)
    if row >= 0:
        h.words[row, i] = value


def _take(free: list[int], which: int, rows: int) -> int:
    if free:
        return free.pop()
    if _used[which] == rows:
        raise OutOfTablesError(f"no room for more than {rows} pages of guest page tables; close some backings")
    _used[which] += 1
    return _used[which] - 1


def contents(hpage: int) -> U64s:
    """Return the 512 words of host page `hpage`, which are kept from now on: a view to read and write."""
    h = hostmm.the_host()
    with _allocating:
        if not h.blocks["words"][hpage >> 9]:
            h.blocks["words"][hpage >> 9] = _take(_free_blocks, 0, len(h.words_page)) + 1
        pages = h.words_page[h.blocks["words"][hpage >> 9] - 1]
        if not pages[hpage & 511]:
            pages[hpage & 511] = _take(_free_pages, 1, len(h.words)) + 1
    view: U64s = h.words[pages[hpage & 511] - 1]
    return view


def forget(first_block: int, blocks: int) -> None:
    """Drop the contents of the pages of `blocks` 2 MiB blocks."""
    h = hostmm.the_host()
    for block in first_block + np.flatnonzero(h.blocks["words"][first_block : first_block + blocks]):
        number = int(h.blocks["words"][block]) - 1
        pages = h.words_page[number]
        h.blocks["words"][block] = 0
        with _allocating:
            for row in pages[pages > 0].tolist():
                h.words[row - 1] = 0
                _free_pages.append(row - 1)
            pages[:] = 0
            _free_blocks.append(number)
