"""The journal: what is whole in it becomes a trace, at whatever byte it was cut off; ranges of pages."""

import numpy as np
import pytest
from commandline import files_of_at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from spte.record.errors import RecordError, TargetError
from spte.record.journal import MAX_DESCRIBED, Journal, finish
from spte.record.ranges import PageSpace, count, merge, pack, unpack
from spte.trace import load

RANGES = st.lists(st.tuples(st.integers(0, 1 << 35), st.one_of(st.integers(1, 9), st.integers(1, 3 << 20))), max_size=6)


def ranges(*pairs):
    return np.array(pairs, np.int64).reshape(-1, 2)


def pages(array):
    return {page for start, end in array.tolist() for page in range(start, end)}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=12))
def test_merge_is_the_union_ascending_and_with_gaps(pairs):
    parts = ranges(*((start, start + length) for start, length in pairs))
    merged = merge([parts[:5], parts[5:]])
    assert pages(merged) == pages(parts)
    assert (merged[1:, 0] > merged[:-1, 1]).all()
    assert count(merged) == len(pages(parts))


@given(RANGES)
def test_packed_ranges_come_back(pairs):
    merged = merge([ranges(*((start, start + length) for start, length in pairs))])
    assert merge([unpack(pack(merged))]).tolist() == merged.tolist()


def test_the_page_space_keeps_what_lay_in_one_huge_page_together():
    space = PageSpace(ranges((512 * 10 + 5, 512 * 10 + 7), (512 * 11, 512 * 12), (512 * 900 + 511, 512 * 901 + 1)))
    assert space.npages == 4 * 512
    assert space.gfns(ranges((512 * 10 + 5, 512 * 10 + 6), (512 * 900 + 511, 512 * 901 + 1))).tolist() == [5, 1024 + 511, 1536]
    assert space.describe() == [[0, 1024, hex(512 * 10 << 12)], [1024, 1024, hex(512 * 900 << 12)]]


def write(path, epochs=3):
    journal = Journal(path)
    journal.about({"format": "spte-trace/1", "command": "a toy"})
    journal.populated(ranges((512 * 7, 512 * 7 + 1)))
    for epoch in range(epochs):
        journal.epoch((epoch + 1) * 10, ranges((512 * 9 + epoch, 512 * 9 + epoch + 2), (512 * 40, 512 * 40 + 1)))
    journal.close()
    return journal.path


def finish_or_refuse(path):
    """Bounds of the epochs that a damaged journal still gives; none if it is refused in one line."""
    try:
        return finish(path, path.with_suffix("")).t_ns.tolist()
    except TargetError as refusal:
        return str(refusal).splitlines()[1:]


def test_a_journal_becomes_the_trace_and_goes(tmp_path):
    path = write(tmp_path / "t.npz")
    trace = finish(path, tmp_path / "t.npz")
    assert not path.exists()
    assert trace.t_ns.tolist() == [0, 10, 20, 30]
    assert trace.gfn.tolist() == [512, 513, 1024, 513, 514, 1024, 514, 515, 1024]
    assert trace.npages == 3 * 512
    assert load(tmp_path / "t.npz").meta == trace.meta


def test_cut_off_at_any_byte_a_journal_gives_its_whole_epochs_or_one_line(tmp_path):
    whole = write(tmp_path / "whole.npz").read_bytes()
    epochs = []
    for length in range(len(whole)):
        path = tmp_path / "t.npz.journal"
        path.write_bytes(whole[:length])
        times = finish_or_refuse(path)
        assert times == [0, 10, 20][: len(times)]
        epochs.append(max(0, len(times) - 1))
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1, 2}


@settings(max_examples=40)
@given(st.integers(15, 200), st.integers(1, 255))
def test_a_changed_byte_ends_the_trace_before_its_record(tmp_path_factory, at, flip):
    path = write(tmp_path_factory.mktemp("j") / "t.npz")
    data = bytearray(path.read_bytes())
    data[min(at, len(data) - 1)] ^= flip
    path.write_bytes(data)
    times = finish_or_refuse(path)
    assert times == [0, 10, 20][: len(times)]


def test_more_ranges_than_meta_holds_are_counted(tmp_path):
    journal = Journal(tmp_path / "t.npz")
    starts = np.arange(MAX_DESCRIBED + 10) * 1024
    journal.epoch(1, np.stack([starts, starts + 1], axis=1))
    journal.close()
    trace = finish(journal.path, tmp_path / "t.npz")
    assert len(trace.meta["ranges"]) == MAX_DESCRIBED
    assert trace.meta["ranges_left_out"] == 10
    assert load(tmp_path / "t.npz").npages == trace.npages


def test_an_epoch_without_a_place_and_a_foreign_file_are_refused(tmp_path):
    journal = Journal(tmp_path / "t.npz")
    journal.close()
    with pytest.raises(TargetError, match="holds no epoch"):
        finish(journal.path, tmp_path / "t.npz")
    (tmp_path / "x").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(TargetError, match="no journal"):
        finish(tmp_path / "x", tmp_path / "t.npz")
    with pytest.raises(TargetError, match="can not be read"):
        finish(tmp_path / "none", tmp_path / "t.npz")
    with pytest.raises(TargetError, match=r"spte record --recover .*t\.npz\.journal"):
        Journal(tmp_path / "t.npz")
    assert not (tmp_path / "t.npz").exists()


def test_on_a_full_disk_the_journal_stays_and_the_line_says_how_to_make_its_trace(tmp_path):
    path = write(tmp_path / "t.npz", epochs=300)
    with files_of_at_most(500), pytest.raises(RecordError) as error:
        finish(path, tmp_path / "t.npz")
    assert str(error.value).startswith(f"{str(tmp_path / 't.npz')!r}: File too large; the recording is in {path}; ")
    assert f"`spte record --recover {path} -o ELSEWHERE`" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz.journal"]
    with files_of_at_most(500), pytest.raises(TargetError, match=r"--recover .*t\.npz\.journal"):
        Journal(tmp_path / "t.npz")
    assert finish(path, tmp_path / "t.npz").nepochs == 300


def test_a_journal_that_takes_nothing_does_not_stay(tmp_path):
    with files_of_at_most(4), pytest.raises(RecordError, match=r"t\.npz\.journal': File too large; nothing is recorded"):
        Journal(tmp_path / "t.npz")
    assert not list(tmp_path.iterdir())
