"""Shared by the tests of readers: a stream with a name, what must hold of every refusal, and a naive trace."""

import io
from pathlib import Path

import pytest

from spte.convert import Slot, convert
from spte.trace import TraceError

DATA = Path(__file__).parent / "data"
NAME = "in"
SLOTS = (Slot(0, 512 << 10, 0), Slot(0xC0000, 256 << 10, 1))
"""The slots of the guest that made the files."""


class Stream(io.BytesIO):
    name = NAME


def read(content, **options):
    """Convert bytes, or several inputs of bytes."""
    return convert([Stream(c) for c in ([content] if isinstance(content, bytes) else content)], **options)


def epochs(trace):
    return [trace.epoch(i).tolist() for i in range(trace.nepochs)]


def check_refusal(error):
    text = str(error)
    assert text.startswith(f"{NAME}: ")
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 400


def refusal(content, **options):
    with pytest.raises(TraceError) as error:
        read(content, **options)
    check_refusal(error.value)
    return str(error.value)


def converted_or_refused(content, **options):
    """Return the epochs, or None if the input was refused as it must be; nothing else may happen."""
    try:
        return epochs(read(content, **options).trace)
    except TraceError as error:
        check_refusal(error)
        return None


def naive(writes, interval_ns):
    """Return the sorted distinct pages of each epoch for (t_ns, page) pairs, epoch 0 at the first pair's time."""
    start = writes[0][0]
    pages = {}
    for t_ns, page in writes:
        pages.setdefault((t_ns - start) // interval_ns, set()).add(page)
    return [sorted(pages.get(e, ())) for e in range(min(pages), max(pages) + 1)]
