"""Bitmaps, .npy stacks, dirty rings, pagemap snapshots, and how slots lie in a trace."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spte.convert import Slot, convert
from spte.convert.formats.ring import ENTRY
from spte.convert.slots import Slots
from spte.trace import TraceError
from tests.convert.reading import SLOTS, Stream, epochs, read, refusal

PAGE = 4096


def bitmap(pages, npages):
    bits = np.zeros(-(-npages // 64) * 64, np.uint8)
    bits[list(pages)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def ring(*entries):
    return np.array(list(entries), ENTRY).tobytes()


def pagemap(dirty, npages):
    entries = np.full(npages, 1 << 63, np.uint64)
    entries[list(dirty)] |= np.uint64(1 << 55)
    return entries.tobytes()


def behind_zeros(kind):
    """A ring of which the first entries are free; a range of memory of which the first pages were never touched."""
    if kind == "ring":
        entries = np.zeros(30_000, ENTRY)
        entries["flags"][20_000:20_100], entries["offset"][20_000:20_100] = 1, np.arange(100) * 7
        return entries.tobytes()
    return bytes(8 * 10_000) + pagemap(range(100), 200)


@pytest.mark.parametrize("kind", ["ring", "pagemap"])
def test_the_format_is_told_by_what_comes_behind_zeros(kind, tmp_path):
    path = tmp_path / "in"
    path.write_bytes(content := behind_zeros(kind))
    got = convert([path])
    assert got.format == kind
    assert epochs(got.trace) == epochs(read(content, format=kind).trace)
    assert len(epochs(got.trace)[0]) == 100


@pytest.mark.parametrize("kind", ["ring", "pagemap"])
def test_a_stream_that_begins_with_zeros_is_asked_for_its_format(kind):
    assert "begins with 65536 zeros" in refusal(behind_zeros(kind))
    assert epochs(read(bytes(1 << 16)).trace) == [[]]  # a bitmap in which nothing is dirty


slot_shapes = st.lists(st.tuples(st.integers(0, 700), st.integers(1, 700)), min_size=1, max_size=4)


@given(slot_shapes, st.randoms(use_true_random=False), st.data())
@settings(max_examples=40)
def test_bitmaps_of_slots_however_they_are_cut_into_files(shapes, random, data):
    slots, gfn = [], 0
    for hole, pages in shapes:
        slots.append(Slot((gfn + hole) * PAGE, pages * PAGE))
        gfn += hole + pages
    random.shuffle(slots)
    written = [[data.draw(st.sets(st.integers(0, s.size // PAGE - 1), max_size=9)) for s in slots] for _ in range(3)]
    parts = [bitmap(pages, slot.size // PAGE) for epoch in written for slot, pages in zip(slots, epoch, strict=True)]
    placed = Slots(slots)
    ref = [sorted(p + placed.start(s) for s, pages in zip(placed.given, epoch, strict=True) for p in pages) for epoch in written]
    cut = data.draw(st.integers(1, len(parts)))
    files = [b"".join(parts[:cut]), *([b"".join(parts[cut:])] if cut < len(parts) else [])]
    assert epochs(read(files, slots=slots, format="bitmap").trace) == ref
    rows = np.stack([np.frombuffer(b"".join(parts[i : i + len(slots)]), np.uint64) for i in range(0, len(parts), len(slots))])
    assert epochs(read(npy(rows), slots=slots).trace) == ref


@given(slot_shapes)
@settings(max_examples=40)
def test_slots_keep_their_2m_regions(shapes):
    slots, gfn = [], 0
    for hole, pages in shapes:
        slots.append(Slot((gfn + hole) * PAGE, pages * PAGE))
        gfn += hole + pages
    placed = Slots(slots)
    inside = [g for g in range(gfn + 2) if any(s.gpa <= g * PAGE < s.gpa + s.size for s in slots)]
    regions = sorted({g // 512 for g in inside})
    pages, held = placed.place(np.arange(gfn + 2, dtype=np.uint64))
    assert np.flatnonzero(held).tolist() == inside
    assert pages.tolist() == [regions.index(g // 512) * 512 + g % 512 for g in inside]
    assert placed.npages == 512 * len(regions)
    assert [placed.start(s) for s in slots] == [pages[inside.index(s.gpa // PAGE)] for s in slots]


def test_slots_of_smm_name_the_same_memory():
    smm = [*SLOTS, Slot(0, 128 << 10, 1 << 16), Slot(0xA0000, 128 << 10, 1 << 16 | 1)]
    assert epochs(read(ring((1, 0, 5), (1, 1 << 16, 6), (1, 1 << 16 | 1, 1)), format="ring", slots=smm).trace) == [[5, 6, 161]]


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        ([Slot(0, 4097)], "multiples of 4096"),
        ([Slot(1, 4096)], "multiples of 4096"),
        ([Slot(0, 0)], "above 0"),
        ([Slot(1 << 52, 4096)], "below 2^52"),
        ([Slot(0, 8192), Slot(4096, 4096)], "overlaps"),
        ([Slot(0, 4096, 3), Slot(8192, 4096, 3)], "slot ids [3, 3]"),
        ([Slot(0, 4096, -1)], "slot ids [-1]"),
        ([Slot(0, 1 << 44)], "at most"),
    ],
)
def test_slots_that_can_not_be_are_refused(slots, said):
    with pytest.raises(TraceError, match="slot") as error:
        Slots(slots)
    assert said in str(error.value)


def test_bitmaps_of_one_size_an_epoch_each():
    got = read([bitmap({0, 64, 191}, 192), bitmap((), 192), bitmap({1}, 192)]).trace
    assert (epochs(got), got.npages) == ([[0, 64, 191], [], [1]], 512)
    got = read(bitmap({0, 64}, 700) + bitmap({699}, 700), npages=700).trace
    assert (epochs(got), got.npages) == ([[0, 64], [699]], 1024)


@pytest.mark.parametrize("dtype", ["<u8", "<i8", "|u1", "|b1"])
def test_every_dtype_of_a_stack(dtype):
    bits = np.zeros((3, 128), np.bool_)
    bits[0, [0, 63, 127]] = bits[2, 64] = True
    rows = bits if dtype == "|b1" else np.packbits(bits, axis=1, bitorder="little").view(dtype)
    assert epochs(read(npy(rows)).trace) == [[0, 63, 127], [], [64]]
    assert epochs(read(npy(rows[0])).trace) == [[0, 63, 127]]


def test_rings_by_slot():
    first = ring((1, 0, 5), (1, 1, 2), (1, 0, 5), (2, 0, 9), (0, 7, 1 << 30))
    got = read([first, ring((0, 0, 0))], format="ring", slots=SLOTS)
    assert epochs(got.trace) == [[5, 194], []]
    assert got.notes == ["1 entries had been collected before the dump (flags 2) and count in no epoch"]
    assert epochs(read(ring((1, 4, 700)), format="ring").trace) == [[700]]


def test_pagemap_snapshots():
    got = read([pagemap({3, 9}, 600), pagemap((), 600)])
    assert (got.format, epochs(got.trace), got.trace.npages) == ("pagemap", [[3, 9], []], 1024)


def test_formats_are_told_apart_by_content():
    many = ring(*((1, 0, i) for i in range(20)))
    assert read(many).format == "ring"
    assert read([ring((1, 0, 3)), many]).format == "ring"
    assert read(bytes(512)).format == "bitmap"
    assert read(b"\xff" * 64).format == "bitmap"
    assert "newline" in refusal(b"U" * 64)
    assert "looks like pagemap, in like ring; convert each alone" in refusal([many, pagemap({1}, 64)])
    assert "say which with --format" in refusal(ring((1, 0, 3)))


def test_strided_bitmaps_are_asked_for():
    """Every 128th page is what a ring of entries that all name page 0 would be."""
    assert "bitmap or ring" in refusal(bitmap(range(0, 1024, 128), 1024))


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (b"", {}, "is empty"),
        (bytes(12), {}, "offset 12"),
        ([bytes(16), bytes(8)], {}, "has 8 bytes and in 16"),
        (bytes(24), {"npages": 128}, "ends at offset 24, 8 bytes into a bitmap of 16"),
        (bitmap({100}, 128), {"npages": 100, "format": "bitmap"}, "offset 12: page 100 is set in a bitmap of 100 pages"),
        (bytes(16), {"slots": SLOTS}, "ends after the bitmaps of 1 of 2 slots"),
        (bytes(20), {"slots": SLOTS}, "ends at offset 20, 4 bytes into a bitmap of 8"),
        ([bytes(24), b""], {"slots": SLOTS, "format": "bitmap"}, "is empty"),
        (bytes(24), {"format": "ring"}, "ends at offset 24, within an entry"),
        (ring((1, 0, 0), (4, 0, 0)), {"format": "ring"}, "offset 16: flags 0x4"),
        (ring((1, 1 << 17, 0)), {"format": "ring"}, "offset 0: flags 0x1, slot 0x20000"),
        (ring((1, 0, 1 << 40)), {"format": "ring"}, "offset 0"),
        (ring((1, 0, 0), (1, 1, 0)), {"format": "ring"}, "offset 16: the entry is of slot 1, others are of slot 0"),
        (ring((2, 0, 0)), {"format": "ring"}, "collected before"),
        (ring((1, 5, 0)), {"format": "ring", "slots": SLOTS}, "slot 5, which was not given"),
        (ring((1, 1, 64)), {"format": "ring", "slots": SLOTS}, "has 0x40"),
        (b"", {"format": "ring"}, "is empty"),
        (bytes(15), {"format": "pagemap"}, "offset 15"),
        (bytes(16), {"format": "pagemap"}, "CONFIG_MEM_SOFT_DIRTY"),
        (b"\xff" * 16, {"format": "pagemap"}, "offset 0: 0xffffffffffffffff"),
        ([pagemap({1}, 64), pagemap({1}, 32)], {}, "has 256 bytes and in 512"),
        (npy(np.zeros((2, 2))), {}, "dtype <f8"),
        (npy(np.zeros((2, 2), ">u8")), {}, "dtype >u8"),
        (npy(np.zeros((2, 2, 2), np.uint64)), {}, "shape (2, 2, 2)"),
        (npy(np.zeros((0, 2), np.uint64)), {}, "shape (0, 2)"),
        (npy(np.zeros(3, np.uint64)[None].repeat(2, 0).T.copy("F")), {}, "column by column"),
        (npy(np.zeros((2, 2), np.uint64)) + b"x", {}, "goes on behind"),
        (npy(np.zeros((2, 2), np.uint64))[:-3], {}, "ends in row 1"),
        (npy(np.full((2, 2), 2, np.uint8)).replace(b"|u1", b"|b1"), {}, "row 0: a bool is 2"),
        (npy(np.zeros((2, 2), np.uint64)), {"npages": 64}, "has 128 pages in a row"),
        (npy(np.ones((1, 2), np.uint64) << np.uint64(63)), {"npages": 100}, "page 0x7f was written"),
        (npy(np.full((1, 3), 1 << 63, np.uint64)), {"slots": [Slot(0, 60 * PAGE), Slot(1 << 20, 128 * PAGE)]}, "row 0: page 63"),
        (npy(np.zeros(1, np.uint64)).replace(b"(1,)", b"(9,)"), {}, "ends in row 0"),
        (b"\x93NUMPY\x01\x00\x05\x00(((((", {}, "header of this .npy is damaged"),
        (b"\x93NUMPY", {}, "header of this .npy is damaged"),
        (b"\x1f\x8b\x08", {}, "zcat"),
        (b"PK\x03\x04", {}, "zip"),
        (b"\x17\x08\x44tracing", {}, "trace-cmd report"),
        (b"PERFILE2", {}, "perf script"),
        (b"\x7fELF\x02", {}, "ELF"),
        (b"\xaa" * 16, {"addresses": True}, "--bytes"),
        (b"\xaa" * 16, {"time_unit": "s"}, "--time-unit"),
    ],
)
def test_what_can_not_be_read_is_named(content, options, said):
    assert said in refusal(content, **options)


@pytest.mark.parametrize("shape", [(1 << 60,), (1, 1 << 40), (1 << 60, 1 << 60)])
def test_a_row_that_is_larger_than_any_guest_is_not_read(shape):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u8", "fortran_order": False, "shape": shape})
    assert "more than 2147483647" in refusal(header.getvalue())


def test_pickles_are_not_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], object), allow_pickle=True)
    assert "dtype |O" in refusal(stream.getvalue())
    assert b"mkdir" in pickle.dumps(Bomb())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["no", "", "."])
def test_what_is_no_file_is_refused(tmp_path, name):
    from spte.convert import convert

    with pytest.raises(TraceError, match=r"No such file|not a file|Is a directory"):
        convert([tmp_path / name])


def test_options_that_exclude_each_other():
    both = ({"slots": SLOTS, "npages": 5}, {"slots": SLOTS, "squeeze": True})
    for options in (*both, {"npages": 0}, {"interval_ns": 0}, {"time_unit": "h"}, {"format": "x"}):
        with pytest.raises(TraceError):
            read(b"0 1\n", **options)
    from spte.convert import convert

    with pytest.raises(TraceError, match="no input"):
        convert([])


def test_progress_comes_to_the_whole_size(tmp_path):
    from spte.convert import convert

    (tmp_path / "a").write_bytes(b"0 1\n" * 50_000)
    (tmp_path / "b").write_bytes(b"0 1\n")
    told = []
    convert([tmp_path / "a", tmp_path / "b"], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (200_004, 200_004)
    assert told == sorted(told)
    told.clear()
    convert([Stream(b"0 1\n")], progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (4, None)
