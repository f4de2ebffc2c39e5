"""Text and CSV of time and page: parsed all lines at once, as a parser of one line would."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spte.convert import Slot, source
from tests.convert.reading import Stream, epochs, naive, read, refusal

SEPARATORS = (" ", "\t", ",", ", ", ";", "  ", " ,\t")


def spelled_time(ns, way):
    """Seconds, with `way` choosing among the spellings that mean the same."""
    whole, part = divmod(ns, 10**9)
    if way == 1 and part == 0:
        return str(whole)
    if way == 2:
        return f"{ns}e-9"
    if way == 3:
        return f"{whole}.{part:09}000000001"
    return f"{whole}.{part:09}".rstrip("0") if part else f"{whole}."


def spelled_page(page, way):
    return (str(page), f"{page:#x}", f"0X{page:X}", f"{page:06}", f"{page}.0")[way]


lines = st.tuples(
    st.integers(0, 5 * 10**9), st.integers(0, 2**20), st.integers(0, 3), st.integers(0, 4), st.sampled_from(SEPARATORS),
    st.sampled_from(["", " ", "\r"]), st.sampled_from(["", " "]),
)  # fmt: skip


@given(st.lists(lines, min_size=1, max_size=30), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_any_spelling_in_any_order(drawn, header, comments):
    rows = [f"{lead}{spelled_time(ns, a)}{sep}{spelled_page(page, b)}{tail}" for ns, page, a, b, sep, tail, lead in drawn]
    text = ["# made by hand", ""] * comments + ["time,page"] * header + rows[:1] + ["", " # more"] * comments + rows[1:]
    got = read("".join(line + "\n" for line in text).encode())
    assert got.format == "text"
    assert epochs(got.trace) == naive([(ns, page) for ns, page, *_ in drawn], 10**8)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 2**30)), min_size=1, max_size=200), st.integers(20, 300))
@settings(max_examples=25)
def test_blocks_do_not_show(drawn, block):
    text = "".join(f"{ns / 1e9:.9f} {page}\n" for ns, page in drawn).encode()
    size, source.BLOCK = source.BLOCK, block
    try:
        got = epochs(read(text, format="text", interval_ns=10**7).trace)
    finally:
        source.BLOCK = size
    assert got == naive(drawn, 10**7)


class Dribble(Stream):
    """A pipe that gives a few bytes at a time."""

    def read(self, count=-1):
        return super().read(min(count, 3) if count > 0 else count)


def test_a_slow_pipe_gives_the_same_trace():
    from spte.convert import convert

    text = b"".join(b"%d.5 %d\n" % (i, i * i) for i in range(500))
    assert epochs(convert([Dribble(text)]).trace) == epochs(read(text).trace)


@pytest.mark.parametrize(("unit", "digits"), [("s", 0), ("ms", 3), ("us", 6), ("ns", 9)])
def test_units_of_time(unit, digits):
    text = f"{25 * 10**digits // 10} 1\n{3 * 10**digits} 2\n".encode()
    assert epochs(read(text, time_unit=unit, interval_ns=5 * 10**8).trace) == [[1], [2]] if digits else [[1, 2]]


def test_addresses_are_bytes():
    assert epochs(read(b"0 0x7fff\n0 4096\n", addresses=True).trace) == [[1, 7]]


def test_far_pages_are_squeezed_and_told():
    got = read(b"0 0x7f0000001\n0 0x7f0000200\n0 5\n", squeeze=True).trace
    assert epochs(got) == [[5, 513, 1024]]
    assert got.meta["runs"] == [[0, 512], [0x7F0000000, 1024]]
    assert "squeeze" in refusal(b"0 0x7f0000001\n")


def test_a_page_that_the_guest_does_not_have_is_named_by_its_line():
    assert "line 3: '0.2 9' is page 0x9; the guest has 8" in refusal(b"0 1\n\n0.2 9\n", npages=8)
    assert "line 2: '0 0x7f0000001' is page 0x7f0000001; a trace has at most" in refusal(b"0 1\n0 0x7f0000001\n")


@pytest.mark.parametrize("line", [b"nan 5", b"inf,5", b"a1,5", b"time,5", b"time page 5"])
def test_a_first_line_with_a_number_is_no_header(line):
    assert f"line 1: {line.decode()!r} is not a time and a page" in refusal(line + b"\n0.1 6\n")


@pytest.mark.parametrize("line", [b"time,page", b"time page", b'"t (s)";"page number"', b"\xef\xbb\xbftime,gfn", b"\xef\xbb\xbf0.1,6"])
def test_a_header_and_a_byte_order_mark_are_skipped(line):
    assert epochs(read(line + b"\n0.1 6\n").trace) == [[6]]


def test_times_before_the_first_are_told():
    note = "times go back behind the first line's"
    assert [n.startswith(note) for n in read(b"0.15 1\n0.00 2\n").notes] == [True]
    assert read(b"0.00 2\n0.15 1\n0.10 1\n").notes == []


def test_why_no_write_is_left_is_told():
    said = refusal(b"0.1 5\n", slots=[Slot(0, 4096)])
    assert "there is no write in it" in said
    assert "1 writes lie in no slot" in said


def test_several_files_share_one_clock():
    assert epochs(read([b"5.0 1\n", b"5.05 2\n5.25 3\n"]).trace) == [[1, 2], [], [3]]
    assert epochs(read([b"5.0 1\n", b"4.75 2\n"]).trace) == [[2], [], [], [1]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"0 1\n0.1\n", "line 2: '0.1' is not a time and a page"),
        (b"0 1\n0.1 2 3\n", "line 2"),
        (b"0 1\n0.1,,2\n", "line 2"),
        (b"0 1\n,0.1 2\n", "line 2"),
        (b"0 1\nabc def\n", "line 2"),
        (b"time,page\nmore,names\n0 1\n", "no line of a text"),
        (b"0 1\n0.1 1.5\n", "line 2"),
        (b"0 1\n0.1 -1\n", "line 2"),
        (b"0 1\n1e99 1\n", "line 2"),
        (b"0 1\n1e999999999 1\n", "line 2"),
        (b"0 1\n0 1e999999999\n", "line 2"),
        (b"0 1\n0 1e-999999999\n", "line 2"),
        (b"0 1\n1e99999999999999999999999 1\n", "line 2"),
        (b"0 1\n99999999999 1\n", "line 2"),
        (b"0 1\n0 99999999999999999999999\n", "line 2"),
        (b"0 1\n0 0x1ffffffffff\n", "line 2: '0 0x1ffffffffff' is page 0x1ffffffffff"),
        (b"0 1\n0 7fff\n", "line 2"),
        (b"0 1\n0.5 12", "line 2: '0.5 12' has no newline"),
        (b"0 1\n999999 2\n", "lines 1 to 2: the writes lie in more than 8388608 epochs"),
        (b"0 1\n" + b"1" * 70_000 + b" 2\n", "line 2 is longer"),
        (b"0 1\n" + b"1" * 3_000_000, "line 2 is longer"),
        (b"# nothing\n\n", "no line of a text"),
        (b"hello\n", "'hello' is no line of a text"),
        (b"\x1b[31m\n", "no line of a text"),
    ],
)
def test_what_can_not_be_read_is_named_by_its_line(text, said):
    assert said in refusal(text)
