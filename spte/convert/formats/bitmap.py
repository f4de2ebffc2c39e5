"""Dirty bitmaps as KVM_GET_DIRTY_LOG returns them: bit 0 of the first byte is the slot's first page.

The bytes of all inputs are one stream: for each epoch the bitmap of each slot, in the order of the slots. It does not
matter where one file ends and the next begins, as long as that is between two bitmaps.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from spte.convert.slots import Slot
from spte.convert.source import Source
from spte.convert.writes import Writes
from spte.platform import PAGE_SIZE
from spte.trace import MAX_NPAGES
from spte.trace.build import pages_of

ABOUT = "dirty bitmaps of KVM_GET_DIRTY_LOG"
WORD = 8
"""A bitmap is whole 64-bit words."""
MAX_BITMAP = -(-MAX_NPAGES // 64) * WORD


def read(sources: Iterable[Source], writes: Writes) -> None:
    """Give the writes of `sources` to `writes`."""
    options = writes.options
    if options.slots or options.npages is not None:
        _read_stream(sources, writes)
    else:
        _read_files(sources, writes)


def _read_files(sources: Iterable[Source], writes: Writes) -> None:
    """Read a bitmap from each file; all have one size."""
    first: tuple[str, int] | None = None
    for epoch, source in enumerate(sources):
        content = source.read(MAX_BITMAP + 1)
        if len(content) > MAX_BITMAP:
            raise source.error(f"has more than {MAX_BITMAP} bytes, the largest slot's bitmap; several in a row need --pages or --slot")
        if not content or len(content) % WORD:
            raise source.error(f"has {len(content)} bytes, not whole words of {WORD}: it was cut off at offset {len(content)}")
        first = first or (source.name, len(content))
        if len(content) != first[1]:
            raise source.error(
                f"has {len(content)} bytes and {first[0]} {first[1]}: it was cut off, or there are several slots: give them with --slot"
            )
        bitmap = np.frombuffer(content, "<u8")
        writes.space(len(bitmap) * 64)
        writes.epoch(epoch, pages_of(bitmap, source.name))


def _read_stream(sources: Iterable[Source], writes: Writes) -> None:
    """Read bitmaps of known sizes, one behind the other."""
    slots = writes.slots.given if writes.slots else [Slot(0, (writes.options.npages or 0) * PAGE_SIZE)]
    count, source = 0, None
    for source in sources:
        offset = 0
        if source.at_end():
            raise source.error("is empty")
        while not source.at_end():
            slot = slots[count % len(slots)]
            npages = slot.size // PAGE_SIZE
            wanted = -(-npages // 64) * WORD
            content = source.read(wanted)
            if len(content) < wanted:
                raise source.error(
                    f"ends at offset {offset + len(content)}, {len(content)} bytes into a bitmap of {wanted} ({npages} pages): "
                    "it was cut off, or the size is wrong"
                )
            pages = pages_of(np.frombuffer(content, "<u8"), source.name)
            if len(pages) and int(pages[-1]) >= npages:
                raise source.error(
                    f"offset {offset + int(pages[-1]) // 8}: page {int(pages[-1])} is set in a bitmap of {npages} pages; is the size right?"
                )
            start = writes.slots.start(slot) if writes.slots else 0
            writes.epoch(count // len(slots), pages + np.uint64(start))
            count += 1
            offset += wanted
    if source is not None and count % len(slots):
        raise source.error(f"ends after the bitmaps of {count % len(slots)} of {len(slots)} slots; the last epoch is not whole")
