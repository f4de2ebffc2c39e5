"""One `.npy` with a stack of dirty bitmaps, a row an epoch; pickled objects are refused."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from spte.convert.source import Source
from spte.convert.writes import Writes
from spte.platform import PAGE_SIZE
from spte.trace import MAX_NPAGES
from spte.trace.build import pages_of

ABOUT = ".npy stack of dirty bitmaps, a row an epoch"
MAGIC = b"\x93NUMPY"
DTYPES = {"<u8": 64, "<i8": 64, "|u1": 8, "|b1": 1}
"""Pages in an item: words, the bytes of words, or a bool a page."""


def looks_like(head: bytes) -> bool:
    """Return whether it is a `.npy`."""
    return head.startswith(MAGIC)


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the writes of `sources` to `writes`: the rows of the first file, then of the second."""
    epoch = 0
    for source in sources:
        shape, dtype = _header(source)
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        pages = columns * DTYPES[dtype.str]
        if pages > MAX_NPAGES + 63:
            raise source.error(f"has {pages} pages in a row, more than {MAX_NPAGES}; are rows and columns exchanged?")
        sizes = _bitmap_sizes(source, writes, pages, DTYPES[dtype.str])
        for row in range(rows):
            content = source.read(columns * dtype.itemsize)
            if len(content) < columns * dtype.itemsize:
                raise source.error(f"ends in row {row} of the {rows} that its header promises: it was cut off")
            if dtype == np.bool_ and (largest := int(np.frombuffer(content, np.uint8).max())) > 1:
                raise source.error(f"row {row}: a bool is {largest}, neither 0 nor 1")
            written = pages_of(np.frombuffer(content, dtype), source.name)
            writes.epoch(epoch, _placed(source, writes, row, written, sizes))
            epoch += 1
        if not source.at_end():
            raise source.error(f"goes on behind the {rows} rows that its header promises")
        writes.space(pages)


def _header(source: Source) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read and check the header; nothing else of the file is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stream = io.BytesIO(source.head)
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
    except Exception as error:  # NumPy parses the header as Python and raises whatever that raises
        raise source.error(f"the header of this .npy is damaged ({type(error).__name__})") from None
    if dtype.hasobject or dtype.str not in DTYPES:
        raise source.error(f"has dtype {dtype.str}; a stack of bitmaps is uint64 words, their uint8 bytes, or bool pages")
    if len(shape) not in (1, 2) or 0 in shape or (fortran and len(shape) == 2):
        raise source.error(f"has shape {shape}{', column by column' if fortran else ''}; a stack of bitmaps has a row for each epoch")
    if source.size is not None and stream.tell() + math.prod(shape) * dtype.itemsize != source.size:
        raise source.error(f"has {source.size} bytes where its header promises {stream.tell() + math.prod(shape) * dtype.itemsize}")
    source.read(stream.tell())
    return shape, dtype


def _bitmap_sizes(source: Source, writes: Writes, pages: int, per_item: int) -> list[int]:
    """Return the pages that each slot takes up in a row."""
    if writes.slots is None:
        wanted = [pages if writes.options.npages is None else writes.options.npages]
    else:
        wanted = [slot.size // PAGE_SIZE for slot in writes.slots.given]
    sizes = [npages if per_item == 1 else -(-npages // 64) * 64 for npages in wanted]
    if sum(sizes) != pages:
        raise source.error(f"has {pages} pages in a row where --pages or --slot say {sum(sizes)}")
    return sizes


def _placed(
    source: Source, writes: Writes, row: int, written: npt.NDArray[np.uint64], sizes: list[int]
) -> npt.NDArray[np.uint64]:
    """Return the pages of the trace for the bits that are set in a row."""
    if writes.slots is None:
        return written
    parts, start = [], 0
    for slot, size in zip(writes.slots.given, sizes, strict=True):
        mine = written[np.searchsorted(written, start) : np.searchsorted(written, start + size)] - np.uint64(start)
        if len(mine) and int(mine[-1]) >= slot.size // PAGE_SIZE:
            raise source.error(f"row {row}: page {int(mine[-1])} is set in a bitmap of {slot.size // PAGE_SIZE} pages; is the size right?")
        parts.append(mine + np.uint64(writes.slots.start(slot)))
        start += size
    return np.concatenate(parts)
