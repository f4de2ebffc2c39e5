"""Recordings in and out: what is refused, and that nothing is lost."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from spte.recording import file as rec
from spte.recording.ops import OPS, RecordingError, unknown_args, with_defaults
from spte.recording.seq import Step, parse_seq

GOLDEN = Path(__file__).parent.parent / "golden"
HEADER = {"format": rec.FORMAT, "kernel": "6.12.1", "config": "tdp", "params": {}, "scenario": "x"}
NEW_VM = {"i": 0, "op": "new_vm", "args": {}}
COPIES = {"5.10": (77, 76), "6.1": (57,), "6.12": (57, 78), "6.18": (77,), "7.2": (77, 92)}  # of an AMD and of an Intel machine
NESTED_COPIES = {
    "5.10": {"intel-nopml": 26, "intel-pml": 27, "intel-pml-legacy": 27},
    "6.12": {"intel-nopml": 34, "intel-nopml-legacy": 34, "intel-pml": 35, "intel-pml-legacy": 35},
}
L2_ROOT = {"vcpu": 0, "mmu": "guest_mmu", "which": "cur"}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def test_writing_what_was_read_gives_the_same_bytes(tmp_path: Path) -> None:
    archive = sorted(GOLDEN.glob("*.tar.xz"))[0]
    with tarfile.open(archive) as tar:
        for member in list(tar)[:5]:
            stream = tar.extractfile(member)
            assert stream is not None
            data = stream.read()
            got = rec.parse(member.name, data)
            for suffix in (".jsonl", ".jsonl.gz", ".jsonl.xz"):
                path = tmp_path / ("out" + suffix)
                rec.write(path, got.header, got.records)
                assert rec.read(path).records == got.records
            assert (tmp_path / "out.jsonl").read_bytes() == data


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda p: p.name)
def test_every_copy_is_a_recording_whose_arguments_are_all_known(archive: Path) -> None:
    names = []
    for recording in rec.read_all(archive):
        names.append(recording.name)
        for record in recording.records:
            assert record["op"] in OPS
            assert not unknown_args(record["op"], record["args"])
    assert len(names) == copies(archive.name)


def copies(archive: str) -> int:
    """How many recordings there are of a machine."""
    name = archive.removesuffix(".tar.xz")
    if "nested" in name:
        kernel, machine = name.split("-nested-")
        return 10 if "shadow" in name else NESTED_COPIES[kernel].get(machine, 31)
    kernel, machine = name.split("-", 1)
    return 20 if "y90" in name else COPIES[kernel]["intel" in machine]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"\x7fELF\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]\n", "not a JSON object"),
        (b'{"format": "kvm-dirty-golden/2"}\n', "format is 'kvm-dirty-golden/2'"),
        (b"{}\n", "format is None"),
        (lines(HEADER), "without a single op"),
        (lines({**HEADER, "kernel": 6}, NEW_VM), "header key 'kernel'"),
        (lines(HEADER, NEW_VM)[:-5], "line 2 is not JSON, or is cut off"),
        (lines(HEADER, [NEW_VM]), "line 2 is"),
        (lines(HEADER, NEW_VM, {**NEW_VM, "i": 2}), "i is 2 where 1 follows"),
        (lines(HEADER, {**NEW_VM, "i": False}), "i is False"),
        (lines(HEADER, {"i": 0, "op": "new_vm"}), "has no args"),
        (lines(HEADER, {"i": 0, "op": 3, "args": {}}), "op is 3"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": []}), "args is []"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"vcpus": "2"}}), "'vcpus' of new_vm, '2', is not an integer"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"vcpus": True}}), "is not an integer"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"vcpus": 10**30}}), "is outside"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"mode": "real"}}), "is not one of flat, long"),
        (lines(HEADER, {"i": 0, "op": "guest_read", "args": {}}), "needs the argument 'gfns'"),
        (lines(HEADER, {"i": 0, "op": "guest_read", "args": {"gfns": [[1]]}}), "not a pair"),
        (lines(HEADER, {"i": 0, "op": "guest_read", "args": {"gfns": [[0, 1 << 60]]}}), "outside"),
        (lines(HEADER, {"i": 0, "op": "guest_read", "args": {"gfns": [[0, 1 << 20]] * 17}}), "more than"),
        (lines(HEADER, {"i": 0, "op": "guest_read", "args": {"gfns": "all"}}), "not a list"),
        (lines(HEADER, {**NEW_VM, "stats": {"vm": 3}}), "stats of 'vm'"),
        (lines(HEADER, {**NEW_VM, "slots": [{"id": 1}]}), "slots holds"),
        (lines(HEADER, {**NEW_VM, "mmu": [{"vcpu": 0, "leafs": [[0, 0, 1, "e67"]]}]}), "leafs holds"),
        (lines(HEADER, {**NEW_VM, "mmu": {"vcpu": 0}}), "mmu is"),
        (lines(HEADER, {**NEW_VM, "hw": [["pml", 1]]}), "hw holds"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"nested": "vmx"}}), "is not one of auto"),
        (lines(HEADER, {"i": 0, "op": "new_vm", "args": {"nested": "auto", "roots": 0}}), "'roots' of new_vm, 0, is outside"),
        (lines(HEADER, {"i": 0, "op": "l2_map", "args": {}}), "l2_map needs the argument 'gfns'"),
        (lines(HEADER, {"i": 0, "op": "l2_map", "args": {"gfns": [[0, 1]], "level": 3}}), "'level' of l2_map, 3, is outside 1..2"),
        (lines(HEADER, {"i": 0, "op": "l2_map", "args": {"gfns": [[0, 1]], "ad": 4}}), "is outside 0..3"),
        (lines(HEADER, {"i": 0, "op": "l2_write", "args": {"gfns": [[1 << 20, 1]]}}), "outside"),
        (lines(HEADER, {"i": 0, "op": "enter_l2", "args": {"vcpu": -1}}), "'vcpu' of enter_l2, -1, is outside"),
        (lines(HEADER, {"i": 0, "op": "l1_ept_write", "args": {"gfns": [[0, 1]]}}), "one of the arguments 'to' and 'remap'"),
        (lines(HEADER, {"i": 0, "op": "l1_ept_write", "args": {"gfns": [[0, 1]], "to": 5, "remap": 1}}), "one of the arguments"),
        (lines(HEADER, {"i": 0, "op": "l1_ept_write", "args": {"gfns": [[0, 1]], "to": 8}}), "is outside 0..7"),
        (lines(HEADER, {"i": 0, "op": "guest_seq", "args": {}}), "guest_seq needs the argument 'seq'"),
        (lines(HEADER, {"i": 0, "op": "guest_seq", "args": {"seq": 5}}), "is not a string"),
        (lines(HEADER, {**NEW_VM, "l1_exits": [[18, "0"]]}), "l1_exits holds [18, '0'], not 3 values"),
        (lines(HEADER, {**NEW_VM, "l1_exits": [["18", "0", "0"]]}), "l1_exits holds"),
        (lines(HEADER, {**NEW_VM, "l1_exits": {}}), "l1_exits is {}, not a list"),
        (lines(HEADER, {**NEW_VM, "log": ["1"]}), "log is ['1'], not a list of numbers"),
        (lines(HEADER, {**NEW_VM, "nested": [1]}), "nested is [1], not a dict"),
        (lines(HEADER, {**NEW_VM, "nested": {"in_l2": ["1"]}}), "nested.in_l2 is ['1']"),
        (lines(HEADER, {"i": 0, "op": "l2_tables", "args": {"gfns": []}, "entries": [[1, 2]]}), "entries holds [1, 2], not 4"),
        (lines(HEADER, {"i": 0, "op": "collect_ring", "args": {}, "entries": [[1, 2, 1, "7"]]}), "entries holds"),
        (lines(HEADER, {**NEW_VM, "mmu": [{"vcpu": 0, "mmu": "root_mmu"}]}), "a root of 'root_mmu' None"),
        (lines(HEADER, {**NEW_VM, "mmu": [{"vcpu": 0, "mmu": "root_mmu", "which": "prev3"}]}), "a root of 'root_mmu' 'prev3'"),
        (lines(HEADER, {**NEW_VM, "mmu": [{**L2_ROOT, "pgd": ["0"]}]}), "mmu holds the pgd ['0'], not a string"),
        (lines(HEADER, {**NEW_VM, "mmu": [{**L2_ROOT, "leafs": [[1, 0, 1, "b77"]]}]}), "leafs holds"),
        (lines(HEADER, {**NEW_VM, "mmu": [{**L2_ROOT, "mmu": "root_mmu", "leafs": [[1, 0, 1, "b77", 0]]}]}), "leafs holds"),
        (b'{"format": ' + b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b'{"format": ' + b"9" * 5_000 + b"}\n", "line 1 is not JSON"),
        (b'{"format": NaN}\n', "line 1 is not JSON"),
    ],
)
def test_what_is_not_a_recording_is_refused_with_one_line(data: bytes, message: str) -> None:
    with pytest.raises(RecordingError) as caught:
        rec.parse("some.jsonl", data)
    text = str(caught.value)
    assert message in text
    assert text.startswith("some.jsonl: ")
    assert "\n" not in text
    assert len(text) < 300


@pytest.mark.parametrize(
    "step",
    [
        "", "E", "e:1", "q:1-2", "w", "w:", "w:5-", "w:-5", "w:5-4", "w:0x", "w:1,,2", "w:1, 2", "w: 1", "w:" + "9" * 5000, "S", "S:x",
        "P:1-2", "P:1-2=", "P:1-2=8", "P:1-2=7x", "P:1,2=7", "P:3-2=7", "R:1-2", "R:1-2=z", "o",
    ],
)  # fmt: skip
def test_a_step_outside_the_grammar_is_refused_with_one_line_that_holds_it(step: str) -> None:
    record = {"i": 0, "op": "guest_seq", "args": {"seq": f"e/w:0x1000-0x1003/{step}/l"}}
    with pytest.raises(RecordingError, match="holds the step") as caught:
        rec.parse("some.jsonl", lines(HEADER, record))
    text = str(caught.value)
    assert f"holds the step {step[:20]!r}"[:-1] in text
    assert "\n" not in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("seq", "message"),
    [
        ("w:0x100000", "outside 0..1048576"), ("/".join(["w:0-0xfffff"] * 17), "more than"), ("S:16", "switches to root 16"),
        ("R:1=0x10000000000", "remaps to gfn 0x10000000000"),
    ],
)  # fmt: skip
def test_a_step_out_of_bounds_is_refused(seq: str, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        rec.parse("some.jsonl", lines(HEADER, {"i": 0, "op": "guest_seq", "args": {"seq": seq}}))


def test_a_sequence_gives_its_steps_in_order() -> None:
    assert parse_seq("e/w:0x10-0x1F,7/r:16/m:1/c:1/b:1-2/x:3/o:4/i/S:1/P:0x10-17=5/P:1=7d/P:1=0a/R:2-3=0x40/l") == [
        Step("enter"), Step("write", ((16, 16), (7, 1))), Step("read", ((16, 1),)), Step("rmw", ((1, 1),)),
        Step("cmpxchg_fail", ((1, 1),)), Step("read_write", ((1, 2),)), Step("exec", ((3, 1),)), Step("insb", ((4, 1),)),
        Step("invept"), Step("switch", value=1), Step("protect", ((16, 2),), 5), Step("protect", ((1, 1),), 7, "d"),
        Step("protect", ((1, 1),), 0, "a"), Step("remap", ((2, 2),), 64), Step("leave"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.xz", "x.tar.xz", "x.tar.gz", "x.tar"])
def test_a_damaged_archive_is_refused_with_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"not compressed at all")
    with pytest.raises(RecordingError, match=r"x\.") as caught:
        list(rec.read_all(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_a_truncated_archive_is_refused(tmp_path: Path, suffix: str, pack) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / ("x.jsonl" + suffix)
    path.write_bytes(pack(lines(HEADER, NEW_VM))[:-6])
    with pytest.raises(RecordingError):
        rec.read(path)


def test_directories_are_searched_and_archives_give_all_their_members(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jsonl").write_bytes(lines(HEADER, NEW_VM))
    (tmp_path / "notes.txt").write_text("no recording")
    with tarfile.open(tmp_path / "many.tar.gz", "w:gz") as tar:
        for name in ("b.jsonl", "c.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = len(lines(HEADER, NEW_VM))
            tar.addfile(member, io.BytesIO(lines(HEADER, NEW_VM)))
    found = rec.find([tmp_path])
    assert [p.name for p in found] == ["a.jsonl", "many.tar.gz"]
    names = [Path(r.name).name for path in found for r in rec.read_all(path)]
    assert names == ["a.jsonl", "many.tar.gz:b.jsonl", "many.tar.gz:c.jsonl"]
    with pytest.raises(RecordingError, match="holds 2 recordings"):
        rec.read(tmp_path / "many.tar.gz")
    with pytest.raises(RecordingError, match="no such file"):
        rec.find([tmp_path / "none"])


def test_defaults_are_those_of_the_format() -> None:
    assert with_defaults("guest_write", {"gfns": [[1, 2]]}) == {"vcpu": 0, "gfns": [[1, 2]], "off": 0}
    assert with_defaults("madvise", {"backing": "A", "pages": []})["advice"] == 4
    assert with_defaults("new_vm", {}) == {
        "vcpus": 1, "mode": "flat", "guest_page": "2m", "guest_ad": 1, "manual": None, "ring_bytes": 0,
        "nested": None, "l2_ept": 1, "l2_ad": 1, "l2_pml": 0, "roots": 1,
    }  # fmt: skip
    assert with_defaults("l2_map", {"gfns": [[1, 2]]}) == {
        "gfns": [[1, 2]], "l1": None, "level": 1, "perm": 7, "ad": 3, "same": 0, "root": 0,
    }  # fmt: skip


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 500])
def test_runs_and_bitmaps_are_inverses(npages: int) -> None:
    rng = np.random.default_rng(npages)
    pages = np.flatnonzero(rng.random(npages) < 0.5)
    bitmap = rec.bitmap_of(pages, npages)
    assert bitmap.dtype == np.uint64
    assert len(bitmap) == -(-npages // 64)
    assert rec.bits_of(bitmap).tolist() == pages.tolist()
    runs = rec.runs_of(pages)
    assert rec.expand(runs).tolist() == pages.tolist()
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))
