"""`spte replay` and `spte check` as commands: what they write, and their exit codes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spte.check.run import check
from spte.policy import parse
from spte.recording import file as rec
from spte.replay.run import replay

GOLDEN = Path(__file__).parent.parent / "golden"


def load(config: str, name: str) -> rec.Recording:
    return next(r for r in rec.read_all(GOLDEN / f"{config}.tar.xz") if r.name.endswith(f":{name}.jsonl"))


@pytest.fixture(scope="module")
def thp() -> rec.Recording:
    return load("6.12-amd-tdp", "b1_thp_eager")


@pytest.fixture(scope="module")
def ring() -> rec.Recording:
    return load("6.12-intel-pml", "19-ring")


def test_replay_writes_a_recording_that_check_accepts(tmp_path: Path, thp: rec.Recording, ring: rec.Recording) -> None:
    for recording in (thp, ring):
        rec.write(tmp_path / "out.jsonl", recording.header, replay(recording))
        report = check(rec.read(tmp_path / "out.jsonl"))
        assert report.finding is None
        assert report.ops == len(recording.records)


def test_replay_adds_tracepoints_under_their_kernel_names(thp: rec.Recording) -> None:
    names = {event[0] for record in replay(thp, events=True) for event in record.get("events", ())}
    assert {"kvm_page_fault", "fast_page_fault", "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed"} <= names


def spte(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import spte.cli; spte.cli.main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_exits_0_1_or_2(tmp_path: Path, thp: rec.Recording) -> None:
    good = tmp_path / "good.jsonl"
    rec.write(good, thp.header, thp.records)
    result = spte("check", good, "--json")
    out = json.loads(result.stdout)
    assert result.returncode == 0
    assert (out["passed"], out["files"], out["ops"], out["differing"]) == (True, 1, len(thp.records), 0)

    records = copy.deepcopy(thp.records)
    record = next(r for r in records if any(m.get("leafs") for m in r.get("mmu", ())))
    record["mmu"][0]["leafs"][-1][3] = "ea7"
    bad = tmp_path / "bad.jsonl"
    rec.write(bad, thp.header, records)
    result = spte("check", good, bad)
    assert result.returncode == 1
    assert f"op {record['i']} {record['op']}: mmu[0].leafs gfn 0x800 level 2: expected ea7, got ee7" in result.stdout
    assert "2 recordings" in result.stdout
    assert "1 differ" in result.stdout

    (tmp_path / "empty").mkdir()
    assert spte("check", tmp_path / "empty").returncode == 1
    (tmp_path / "foreign.jsonl").write_text('{"format": "other"}\n')
    for path in (tmp_path / "foreign.jsonl", tmp_path / "missing.jsonl"):
        result = spte("check", path)
        assert result.returncode == 2
        assert result.stderr.count("\n") == 1
    result = spte("replay", good, "-o", tmp_path / "out.jsonl.gz")
    assert result.returncode == 0
    assert check(rec.read(tmp_path / "out.jsonl.gz")).finding is None


def test_another_policy_shows_what_that_kernel_would_do(tmp_path: Path, thp: rec.Recording) -> None:
    """6.13 recovers huge pages in place where 6.12 dropped the tables."""
    recorded, out = tmp_path / "recorded.jsonl", tmp_path / "out.jsonl"
    rec.write(recorded, thp.header, thp.records)
    assert spte("check", recorded, "--policy", "6.12").returncode == 0
    result = spte("check", recorded, "--policy", "6.13")
    assert result.returncode == 1
    assert re.search(r"op \d+ set_flags: stats.vm.pages_2m: expected 0, got \d+", result.stdout)
    assert spte("replay", recorded, "--policy", "6.13", "-o", out).returncode == 0
    assert rec.read(out).header["policy"] == "6.13"
    assert spte("check", out).returncode == 0
    assert spte("check", out, "--policy", "6.12").returncode == 1


def test_a_recorded_module_parameter_holds_unless_the_policy_replaces_it(tmp_path: Path, thp: rec.Recording) -> None:
    assert thp.header["params"]["eager_page_split"] == "Y"

    def small_pages(policy: str | None) -> list[int]:
        records = replay(thp, policy=parse(policy) if policy else None)
        return [sum(run[2] for run in r["mmu"][0].get("leafs", ()) if run[0] == 1) for r in records if "mmu" in r]

    assert small_pages(None) == small_pages("6.12") != small_pages("6.12,eager_page_split=N")


def test_a_wrong_policy_is_refused_in_one_line(tmp_path: Path, thp: rec.Recording) -> None:
    path = tmp_path / "good.jsonl"
    rec.write(path, thp.header, thp.records)
    for verb in ("check", "replay"):
        result = spte(verb, path, "--policy", "9.9")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "'9.9' is not known" in result.stderr
