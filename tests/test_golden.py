"""The model does, op for op and SPTE for SPTE, what real KVM did."""

from __future__ import annotations

import tarfile
from functools import cache
from pathlib import Path

import pytest

from spte import recording as rec
from spte.check import check

GOLDEN = Path(__file__).parent / "golden"


@cache
def archive(path: Path) -> dict[str, rec.Recording]:
    return {r.name.split(":")[-1]: r for r in rec.read_all(path)}


def every_recording() -> list[object]:
    params: list[object] = []
    for path in sorted(GOLDEN.glob("*.tar.xz")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        config = path.name.removesuffix(".tar.xz")
        params += [pytest.param(path, name, id=f"{config}/{name}") for name in names]
    return params


EVERY = every_recording()


@pytest.mark.parametrize(("path", "name"), EVERY)
def test_the_model_does_what_kvm_did(path: Path, name: str) -> None:
    recording = archive(path)[name]
    report = check(recording)
    assert report.finding is None, f"{report.name}: {report.finding}"
    assert report.ops == len(recording.records)
    assert report.fields > report.ops
