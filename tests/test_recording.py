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

from spte import recording as rec
from spte.recording_ops import OPS, RecordingError, unknown_args, with_defaults

GOLDEN = Path(__file__).parent / "golden"
HEADER = {"format": rec.FORMAT, "kernel": "6.12.1", "config": "tdp", "params": {}, "scenario": "x"}
NEW_VM = {"i": 0, "op": "new_vm", "args": {}}


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
    assert len(names) == (57 if "amd" in archive.name else 78)


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
