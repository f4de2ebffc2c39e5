"""Write traces: what is written comes back; what is damaged, foreign or against the rules is refused in one line."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spte.trace import FORMAT, Trace, TraceError, default_trace, load, npz, save

META = {"format": FORMAT, "page_size": 4096, "command": "toy"}


def arrays(**changes):
    good = {
        "t_ns": np.array([0, 10, 10, 30]),
        "indptr": np.array([0, 2, 2, 5]),
        "gfn": np.array([3, 1000, 0, 3, 1023], np.uint32),
        "npages": np.int64(1024),
        "meta": np.str_(json.dumps(META)),
    }
    return {**good, **changes}


def packed(**changes):
    stream = io.BytesIO()
    np.savez_compressed(stream, **{k: v for k, v in arrays(**changes).items() if v is not None})
    return stream.getvalue()


def refusal(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


@st.composite
def made_traces(draw):
    npages = 512 * draw(st.integers(1, 4))
    epochs = draw(st.lists(st.sets(st.integers(0, npages - 1), max_size=20), min_size=1, max_size=6))
    times = sorted(draw(st.lists(st.integers(0, 2**62), min_size=len(epochs) + 1, max_size=len(epochs) + 1)))
    gfn = [page for epoch in epochs for page in sorted(epoch)]
    dtype = draw(st.sampled_from([np.uint32, np.uint64]))
    bounds = np.cumsum([0, *map(len, epochs)])
    return Trace(np.array(times), bounds, np.array(gfn, dtype), npages, {"command": draw(st.text(max_size=20))}), epochs


@given(made_traces())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, made):
    ref, epochs = made
    path = tmp_path_factory.mktemp("trace") / "any name"
    save(ref, path)
    got = load(path)
    assert [set(got.epoch(i).tolist()) for i in range(got.nepochs)] == epochs
    assert got.gfn.dtype == ref.gfn.dtype
    assert (got.t_ns == ref.t_ns).all()
    assert (got.npages, got.meta) == (ref.npages, ref.meta)


def test_the_shipped_trace_is_the_recording_of_sqlite():
    got = default_trace()
    assert (got.nepochs, got.npages, got.writes) == (54, 89_088, 508_589)
    assert got.command.startswith("sqlite3")
    assert got.duration_ns > 54 * 40_000_000


def test_a_trace_can_not_be_changed_and_shares_nothing_with_its_source():
    source = arrays()
    got = Trace(source["t_ns"], source["indptr"], source["gfn"], 1024)
    source["gfn"][:] = 0
    assert got.epoch(0).tolist() == [3, 1000]
    with pytest.raises(ValueError, match="read-only"):
        got.epoch(0)[0] = 1


def test_an_epoch_that_does_not_exist_is_an_index_error():
    got = Trace(**{**arrays(), "meta": META, "npages": 1024})
    assert got.epoch(2).tolist() == [0, 3, 1023]
    for index in (3, -1):
        with pytest.raises(IndexError, match="3 epochs"):
            got.epoch(index)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    whole = packed()
    for end in range(0, len(whole), 7):
        refusal(tmp_path, whole[:end])


def test_a_damaged_byte_is_refused_or_changes_nothing(tmp_path):
    whole, refused = packed(), 0
    path = tmp_path / "t.npz"
    ref = Trace(**{**arrays(), "meta": META, "npages": 1024})
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            got = load(path)
        except TraceError:
            refused += 1
        else:
            assert all((getattr(got, name) == getattr(ref, name)).all() for name in ("t_ns", "indptr", "gfn"))
            assert got.npages == ref.npages
    assert refused > len(whole) / 3 / 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"t_ns": np.array([0, 10, 9, 30])}, "t_ns[2] is 9 after 10"),
        ({"t_ns": np.array([-1, 10, 10, 30])}, "t_ns[0] is -1"),
        ({"t_ns": np.array([0, 30])}, "t_ns has 2 bounds, indptr 4"),
        ({"t_ns": np.array([0.0, 1, 2, 3])}, "t_ns has dtype <f8"),
        ({"t_ns": np.array([[0, 10, 10, 30]])}, "t_ns has shape (1, 4)"),
        ({"indptr": np.array([0, 3, 2, 5])}, "indptr[2] is 2 after 3"),
        ({"indptr": np.array([0, 2, 2, 4])}, "from 0 to 4"),
        ({"indptr": np.array([1, 2, 2, 5])}, "from 1 to 5"),
        ({"indptr": np.array([0]), "t_ns": np.array([0]), "gfn": np.array([], np.uint32)}, "at least 2"),
        ({"indptr": np.array([0, 2, 2, 5], np.int32)}, "indptr has dtype <i4"),
        ({"gfn": np.array([3, 1024, 0, 3, 1023], np.uint32)}, "gfn[1] is 1024"),
        ({"gfn": np.array([3, 3, 0, 3, 1023], np.uint32)}, "gfn[1] is 3 after 3 in epoch 0"),
        ({"gfn": np.array([3, 1000, 5, 3, 1023], np.uint64)}, "gfn[3] is 3 after 5 in epoch 2"),
        ({"gfn": np.array([3, 1000, 0, 3, 1023])}, "gfn has dtype <i8"),
        ({"gfn": np.array([3, 1000, 0, 3, 1023], ">u4")}, "gfn has dtype >u4"),
        ({"gfn": np.array(["3", "4", "5", "6", "7"])}, "gfn has dtype <U1"),
        ({"npages": np.int64(1000)}, "npages is 1000"),
        ({"npages": np.int64(0)}, "npages is 0"),
        ({"npages": np.int64(-512)}, "npages is -512"),
        ({"npages": np.int64(1 << 40)}, f"npages is {1 << 40}"),
        ({"npages": np.array([1024])}, "npages has shape (1,)"),
        ({"meta": np.str_("{")}, "meta is not JSON"),
        ({"meta": np.str_("[" * 100_000)}, "meta is not JSON"),
        ({"meta": np.str_("[]")}, "meta is a JSON list"),
        ({"meta": np.str_("{}")}, "meta has no format"),
        ({"meta": np.str_('{"format": "other/2"}')}, "format is 'other/2'"),
        ({"meta": np.str_(json.dumps({**META, "page_size": 65536}))}, "page_size is 65536"),
        ({"meta": np.str_("x" * 400_000)}, "meta has 1600000 bytes"),
        ({"meta": np.bytes_(b"{}")}, "meta has dtype |S2"),
        ({"gfn": None}, "'gfn' is missing"),
        ({"more": np.zeros(3)}, "'more.npy'"),
    ],
)
def test_a_broken_rule_is_named_with_its_value(tmp_path, changes, said):
    assert said in refusal(tmp_path, packed(**changes))


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), os.urandom(999)])
def test_a_foreign_file_is_refused(tmp_path, content):
    refusal(tmp_path, content)


def test_pickles_in_a_trace_are_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    stream = io.BytesIO()
    np.savez(stream, **arrays(gfn=np.array([Bomb()], object)), allow_pickle=True)
    assert "gfn has dtype |O" in refusal(tmp_path, stream.getvalue())
    assert pickle.dumps(Bomb())
    assert not (tmp_path / "executed").exists()


def replaced(name, content):
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed())) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename == name else old.read(info))
    return stream.getvalue()


def test_a_header_that_promises_more_than_there_is_allocates_nothing(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u4", "fortran_order": False, "shape": (1 << 60,)})
    assert "its header promises" in refusal(tmp_path, replaced("gfn.npy", header.getvalue()))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x05\x00(((((", b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\xff\xff"])
def test_a_damaged_header_is_refused(tmp_path, content):
    refusal(tmp_path, replaced("t_ns.npy", content))


def test_a_file_that_unpacks_beyond_the_limit_is_refused_before_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAX_BYTES", 500)
    assert "more than the 500 allowed" in refusal(tmp_path, packed())


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    stream = io.BytesIO(packed())
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("gfn.npy", b"")
    assert "twice" in refusal(tmp_path, stream.getvalue())


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in (
        (tmp_path, "not a regular file"),
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(TraceError, match=said):
            load(path)


def test_a_command_with_terminal_codes_is_shown_escaped():
    got = Trace(**{**arrays(), "npages": 1024, "meta": {**META, "command": "a\x1b[31m\nb"}})
    assert got.command == r"a\x1b[31m\nb"
