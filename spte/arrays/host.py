"""The host's mappings by host page number, one record a 2 MiB block; see `spte.host.pages` for the states."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.arrays.records import I64s, Records, U64s, columns, record

BLOCK = record("block", [
    ("device", "u1"),  # 1: device memory (DAX)
    ("state", "u1"),
    ("row", "i4"),  # of a block in state MIXED: its row in `page`
    ("words", "i4"),  # row + 1 of `words_page` of a block some of whose pages have contents
])  # fmt: skip

MIXED_BLOCK = record("mixed_block", columns("i4", "own_pages", "next_free"))  # own writable pages; next freed row + 1

HOST_ROWS = record("host_rows", columns("i8", "used", "free"))  # rows of `page` that were ever taken; first freed one + 1


class Host(NamedTuple):
    """The host's memory."""

    kinds: npt.NDArray[np.uint8]  # [blocks] kind of memory: all that a block takes until it is touched
    blocks: Records  # [blocks] BLOCK
    rows: Records  # [1] HOST_ROWS
    rows_lock: I64s  # [1] 1: a thread takes or gives back a row of `page`, which all VMs have from one array
    pages_lock: I64s  # [1] 1: a vCPU that runs beside others changes page states in a fault
    mixed_blocks: Records  # [rows] MIXED_BLOCK
    page: npt.NDArray[np.uint8]  # [rows, 512] states of single pages
    alone: U64s  # [blocks, 8] a bit a page of THP memory that is no part of a huge page: it was dropped alone
    words_page: npt.NDArray[np.int32]  # [rows, 512] row + 1 of `words`
    words: U64s  # [rows, 512] contents of the pages that hold guest page tables
