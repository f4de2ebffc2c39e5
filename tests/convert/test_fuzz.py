"""No input does anything but give the trace that it holds, or end in one line: cut at every byte, damaged, or made up."""

import io
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spte.convert import FORMATS
from tests.convert.reading import DATA, SLOTS, check_refusal, converted_or_refused, epochs, read
from tests.convert.test_raw import npy, pagemap
from tests.convert.test_tracepoints import FORMS, TOOLS, text_of

TEXT = b"# comment\ntime,page\n0.0 5\n0.15,0x1267\n1e-1 7\n0.25 12\n"
EVENTS = b"cpus=2\n" + text_of([(tool, form, 70_000 * i, 16 + i, True) for i, (tool, form) in enumerate(zip(TOOLS, FORMS, strict=True))])
REAL = b"".join((DATA / "trace-cmd.txt").read_bytes().splitlines(keepends=True)[4:7])
LACKEY = b"==1== Lackey, an example\n==1== Command: ./a\nI  04000ab0,3\n S 00402ffc,8\n M 1ffefffe40,8\n==1==  guest instrs: 1\n"
FILES = {
    "bitmap": (b"".join((DATA / f"dirty-{i}.bin").read_bytes() for i in range(4)), {"slots": SLOTS, "format": "bitmap"}),
    "npy": (npy(np.arange(12, dtype=np.uint64).reshape(4, 3)), {}),
    "ring": ((DATA / "ring-0.bin").read_bytes()[:160], {"slots": SLOTS, "format": "ring"}),
    "pagemap": (pagemap({1, 3}, 12), {"format": "pagemap"}),
    "ftrace": (REAL, {"slots": SLOTS}),
    "every event": (EVENTS, {}),
    "lackey": (LACKEY, {}),
    "text": (TEXT, {}),
}
UNIT = {"bitmap": 24, "ring": 16, "pagemap": 8}
"""Bytes after which a cut can not be seen: an epoch of both slots, an entry, a page."""
LINES = ("ftrace", "every event", "lackey", "text")
each_file = pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name == "every event" else ()) for name in FILES])


def whole_records(name, content):
    return content.endswith(b"\n") if name in LINES else name in UNIT and len(content) % UNIT[name] == 0


@each_file
def test_a_file_that_is_cut_off_anywhere_is_refused_or_has_just_the_writes_before_the_cut(name):
    content, options = FILES[name]
    whole = pairs(epochs(read(content, **options).trace))
    before, refused = set(), 0
    for cut in range(len(content)):
        got = converted_or_refused(content[:cut], **options)
        if got is None:
            refused += 1
            continue
        assert whole_records(name, content[:cut]), f"cut at byte {cut} within a record"
        assert before <= pairs(got) <= whole
        before = pairs(got)
    assert bool(before) == (name != "npy")  # whose header knows its size
    assert refused > len(content) / 2


def pairs(got):
    return {(epoch, page) for epoch, pages in enumerate(got) for page in pages}


@each_file
def test_a_damaged_byte_is_refused_or_read(name):
    content, options = FILES[name]
    for at in range(len(content)):
        flip = (0x01, 0x80, 0x55)[at % 3]
        converted_or_refused(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :], **options)


kinds = st.sampled_from([None, *FORMATS])
some_options = st.fixed_dictionaries(
    {"format": kinds},
    optional={
        "slots": st.just(SLOTS),
        "npages": st.sampled_from([1, 64, 100, 1 << 20]),
        "addresses": st.just(True),
        "squeeze": st.just(True),
        "time_unit": st.sampled_from(["s", "ns"]),
        "interval_ns": st.sampled_from([1, 10**6, 10**15]),
    },
)


def attempt(content, options):
    if "slots" in options:
        options = {key: value for key, value in options.items() if key not in ("npages", "squeeze")}
    converted_or_refused(content, **options)


words = st.sampled_from([
    b"kvm_page_fault:", b" address ", b" error_code ", b"kvm_dirty_ring_push:", b" slot ", b" offset ", b" gfn ", b" level ",
    b"kvm_mmu_set_spte: gfn 1", b" spte e67", b"1.000001: ", b" kvm:", b"0x", b"ffffffffffffffff", b"99999999999999999999",
    b"1", b"2", b"0.5", b"-1", b"e9", b" S ", b" M ", b"I  ", b"04000ab0,3", b"==1== ", b"Lackey", b"\n", b"\n", b"\n",
    b",", b";", b" ", b"#", b"\0", b"\r", b"\xff", b"CPU:1 [LOST 3 EVENTS]", b"\x93NUMPY\x01\x00", b"\x55" * 8, bytes(8),
])  # fmt: skip


@given(st.lists(words, max_size=40).map(b"".join), some_options)
@settings(max_examples=150)
def test_words_of_the_formats_in_any_order(content, options):
    attempt(content, options)


@given(st.binary(max_size=200), some_options)
@settings(max_examples=100)
def test_any_bytes(content, options):
    attempt(content, options)


@given(st.sampled_from([*FILES]), st.data())
@settings(max_examples=100)
def test_spliced_files(name, data):
    """A piece of a file is left out, doubled, or put into another's place."""
    content, options = FILES[name]
    other = FILES[data.draw(st.sampled_from([*FILES]))][0]
    place = partial(data.draw, st.integers(0, len(content)))
    first, last = sorted((place(), place()))
    start, end = sorted((data.draw(st.integers(0, len(other))), data.draw(st.integers(0, len(other)))))
    converted_or_refused(content[:first] + other[start:end] + content[last:], **options)


@pytest.mark.long
@given(st.lists(words, max_size=60).map(b"".join) | st.binary(max_size=600), some_options)
@settings(max_examples=5000)
def test_far_more_of_the_same(content, options):
    attempt(content, options)


def test_a_stream_that_fails_is_one_line():
    class Broken(io.RawIOBase):
        name = "in"

        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    from spte.convert import convert
    from spte.trace import TraceError

    with pytest.raises(TraceError) as error:
        convert([Broken()])
    check_refusal(error.value)
    assert "Input/output error" in str(error.value)
