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


# What the model does not do yet; strict, so that a model that does it must take the name off.
LONG = "shadow paging of a 64-bit guest"
NOT_YET = {
    **dict.fromkeys(("i1_long_g2m_4k", "i1_long_g2m_thp", "i1_long_g4k_4k", "i1_long_g4k_thp", "i2_long_pt_logged"), LONG),
    **dict.fromkeys(("12-long-4kpt", "13-long-4kpt-noad", "24-thp-long-rounds"), LONG),
}
NESTED = "6.12-nested-*"  # archives of a guest that runs a guest: their ops have no replay yet
TIMING = "6.1 yielded, and so flushed, in the middle of the walk over a 1 GiB slot"


def reason_of(config: str, scenario: str) -> str | None:
    if config == "6.1-amd-shadow" and scenario == "b6_hugetlb1g":
        return TIMING
    return NOT_YET.get(scenario) if config.endswith("-shadow") else None


def every_recording() -> list[object]:
    params: list[object] = []
    for path in sorted(set(GOLDEN.glob("*.tar.xz")) - set(GOLDEN.glob(NESTED))):
        with tarfile.open(path) as tar:
            names = tar.getnames()
        config = path.name.removesuffix(".tar.xz")
        for name in names:
            reason = reason_of(config, name.removesuffix(".jsonl"))
            marks = [pytest.mark.xfail(reason=reason)] if reason else []
            params.append(pytest.param(path, name, id=f"{config}/{name}", marks=marks))
    return params


EVERY = every_recording()


@pytest.mark.parametrize(("path", "name"), EVERY)
def test_the_model_does_what_kvm_did(path: Path, name: str) -> None:
    recording = archive(path)[name]
    report = check(recording)
    assert report.finding is None, f"{report.name}: {report.finding}"
    assert report.ops == len(recording.records)
    assert report.fields > report.ops
