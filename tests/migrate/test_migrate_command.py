"""`spte migrate`: what it prints, what it refuses, and the commands of docs/migrate.md."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commandline import refused, save_toy, spte

from spte._numba import jit as _jit
from spte.cost import dump, load
from spte.migrate.settings import DEFAULTS, plan_of
from spte.trace import Trace, save
from spte.vm.vm import VM

ROOT = Path(__file__).parents[2]
HOW_TO = (ROOT / "docs" / "migrate.md").read_text()
# A command of which a page shows what it prints: <!-- spte migrate ... --markdown -->, its output, <!-- end -->.
SHOWN = [
    pytest.param(command, text, id=f"{name}: {command}")
    for name in ("README.md", "docs/migrate.md")
    for command, text in re.findall(r"<!-- (spte migrate .*?) -->\n(.*?)<!-- end -->", (ROOT / name).read_text(), re.DOTALL)
]
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", HOW_TO, re.DOTALL) for line in block.splitlines()]
compiled = pytest.mark.skipif(_jit.PLAIN, reason="hundreds of thousands of accesses in plain Python")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.npz")


@pytest.fixture(autouse=True)
def warm(monkeypatch):
    monkeypatch.setattr(_jit, "is_warm", lambda: True)


def test_a_run_prints_its_rounds_how_it_ended_and_what_is_left(capsys, toy):
    code, out, err = spte(capsys, "migrate", toy, "--bandwidth", "100Mbit", "--downtime", "30ms", "--platform", "npt", "--cost", "guess")
    assert (code, err) == (0, "")
    assert out.startswith("a toy\n4 MiB, on thp, 1 vCPU, npt, policy 6.12, log bitmap, throttle none, costs guess, 100 Mbit/s, downtime")
    assert re.search(r"^1 +[\d.]+ us +\d+\.?\d* ms +1,024 +\d+ +\d+ +[\d.]+ us +-$", out, re.MULTILINE)
    assert re.search(r"^converged: total time .* ms, downtime .* ms \(last harvest .* [un]s, pages .*s, fixed 20 ms\)$", out, re.MULTILINE)
    assert "0 slots log, 0 pages pending, 2 MiB pages 2 before, 0 while logging, 2 back after 2 faults" in out
    assert "guest stall" not in spte(capsys, "migrate", toy)[1]


def test_a_downtime_above_what_was_allowed_is_told(capsys, toy, tmp_path):
    costs = tmp_path / "slow.toml"
    profile = load("guess")
    slow = {kind: dataclasses.replace(getattr(profile, kind), get_word=200_000.0) for kind in ("costs", "low", "high")}
    costs.write_text(dump(dataclasses.replace(profile, **slow)))
    argv = ["migrate", toy, "--bandwidth", "100Mbit", "--cost", costs, "--fixed-downtime", "1us"]  # a GET takes 3.2 ms
    assert "more than the" not in spte(capsys, *argv, "--downtime", "100ms")[1]
    out = spte(capsys, *argv, "--downtime", "5ms", "--max-time", "10s")[1]
    told = re.search(r"^converged: .* downtime ([\d.]+) ms .*, more than the ([\d.]+) ms allowed", out, re.MULTILINE)
    assert 5 == float(told[2]) < float(told[1])


def test_json_holds_the_plan_and_every_round(capsys, toy):
    code, out, _ = spte(capsys, "migrate", toy, "--json", "--bandwidth", "1MB/s", "--max-time", "5s", "--vcpus", "2")
    told = json.loads(out)
    (one,) = told["runs"]
    assert (code, told["schema"]) == (0, "spte-migrate/1")
    assert (one["plan"]["bandwidth"], one["plan"]["workload"]["vcpus"], one["plan"]["max_ns"]) == (10**6, 2, 5 * 10**9)
    assert not one["converged"]
    assert one["downtime_ns"] is None
    assert one["total_ns"] == sum(r["duration_ns"] for r in one["rounds"]) == 5 * 10**9
    assert one["pages_sent"] == sum(r["sent"] for r in one["rounds"])
    assert one["rounds"][-1]["dirtied"] is None
    assert one["stall_ns"] is one["enable_ns"] is one["rounds"][0]["vmm_ns"] is None  # no costs, no estimates
    assert "did not converge: cancelled after 5 s" in spte(capsys, "migrate", toy, "--bandwidth", "1MB/s", "--max-time", "5s")[1]


def test_many_rounds_are_shown_from_both_ends(capsys, toy):
    out = spte(capsys, "migrate", toy, "--bandwidth", "3MB/s", "--downtime", "21ms")[1]
    numbers = re.findall(r"^(\d+|\.\.\.)  ", out, re.MULTILINE)
    assert numbers[:9] == [*(str(n) for n in range(1, 9)), "..."]
    assert len(numbers) == 13


def test_a_map_of_two_axes_and_a_list_of_more(capsys, toy, tmp_path):
    picture, text = tmp_path / "map.png", tmp_path / "map.md"
    axes = ["--grid", "bandwidth=1MB/s,8Mbit,1Gbit", "--grid", "downtime=25ms,1s", "--max-time", "10s"]
    code, out, err = spte(capsys, "migrate", toy, *axes, "--markdown", "--plot", picture, "--output", text)
    assert (code, out, err) == (0, "", "")
    assert picture.read_bytes().startswith(PNG)
    header, _, *rows = text.read_text().splitlines()
    assert header == "| bandwidth \\ downtime | 25 ms | 1 s |"
    assert [row.split(" | ")[0] for row in rows] == ["| 8 Mbit/s", "| 1 Gbit/s"]  # 1MB/s is 8 Mbit/s
    assert [" no " in row for row in rows] == [True, False]
    axes = ["--grid", "policy=6.12,eager_page_split=N,5.10", "--grid", "nested=yes,no", "--grid", "vcpus=2"]
    lines = [line.split() for line in spte(capsys, "migrate", toy, *axes)[1].splitlines()[5:]]
    assert [line[:3] for line in lines] == [[p, n, "2"] for p in ("6.12,eager_page_split=N", "5.10") for n in ("yes", "no")]
    assert spte(capsys, "migrate", toy, "--plot", tmp_path / "one.svg")[0] == 0
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_a_page_that_did_not_arrive_is_named_and_the_exit_code_is_1(capsys, toy, monkeypatch):
    get = VM.get_dirty_log
    monkeypatch.setattr(VM, "get_dirty_log", lambda self, slot, out=None: get(self, slot, out) & ~np.uint64(1 << 9))
    code, out, err = spte(capsys, "migrate", toy, "--bandwidth", "100Mbit")
    assert code == 1
    assert out.startswith("a toy")
    assert re.fullmatch(r"spte migrate: \d+ pages arrived in an older version than the source has, the first of them gfn \d*9\n", err)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--bandwidth", "0"], "'0' is no bandwidth above 0; take a number and Mbit or Gbit"),
        (["--bandwidth", "0MB/s"], "'0MB/s' is no rate above 0"),
        (["--downtime", "20ms"], "a downtime of 20 ms is not above its fixed part of 20 ms"),
        (["--memory", "2M"], "memory of 2097152 bytes; this trace in one memslot takes from 4194304 (its own size)"),
        (["--memory", "5M"], "memory=5242880 is not a multiple of 2 MiB; round it"),
        (["--memory", "7T"], "a guest of 7 TiB may need"),
        (["--cost", "gold"], "no cost profile 'gold'; take one of guess"),
        (["--platform", "arm"], "platform 'arm' is not known"),
        (["--policy", "4.4"], "policy '4.4'"),
        (["--throttle", "dirty-limit"], "take log='ring'"),
        (["--log", "manual", "--clear-chunk", "100"], "clear_chunk=100 is not a positive multiple of 64"),
        (["--vcpus", "two"], "'two' is no whole number"),
        (["--rate", "1GB/s"], "--rate is for --workload stress"),
        (["--workload", "stress"], "with --workload stress: one of both"),
        (["--log", "ring", "--ring", "5000"], "ring of 5000 bytes"),
        (["--grid", "log=bitmap,ring", "--ring", "1000"], "ring of 1000 bytes is not a power of two; take 16384"),
        (["--grid", "log=bitmap,ring", "--policy", "5.10"], "policy 5.10 has no dirty rings; log to bitmaps, or take a newer policy"),
        (["--policy", "5.10", "--grid", "vcpus=1,1000"], "vcpus=1000 is not in 0..288"),
        (["--grid", "backing=thp,hugetlb1g"], "size=4194304 of a hugetlb1g backing"),
        (["--grid", "speed=1"], "take OPTION=VALUE,VALUE, OPTION one of bandwidth, downtime"),
        (["--grid", "downtime="], "take OPTION=VALUE,VALUE"),
        (["--grid", "downtime=1s", "--downtime", "2s"], "--downtime is given twice"),
        (["--grid", "vcpus=1,2", "--plot", "one.png"], "--plot draws one migration, or the map of two --grid; there are 1"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(capsys, toy, monkeypatch, argv, said):
    monkeypatch.setattr("spte.cli.verbs.migrate.run_migrate", None)
    assert said in refused(capsys, "migrate", toy, *argv)


def test_a_lap_of_stress_that_is_too_long_names_rate_and_memory(capsys):
    err = refused(capsys, "migrate", "--workload", "stress", "--rate", "1KB/s")
    assert "rate=1000 bytes/s takes 1073741 s to write memory=1073741824 bytes once; take a rate of 12800 or more, or less memory" in err


def test_an_empty_trace_and_one_that_is_not_there_are_refused(capsys, tmp_path):
    path = tmp_path / "empty.npz"
    save(Trace(np.array([0, 10**9]), np.array([0, 0]), np.empty(0, np.uint32), 512), path)
    assert "the trace writes no page; a migration needs writes in time" in refused(capsys, "migrate", path)
    assert "missing.npz: can not be read" in refused(capsys, "migrate", tmp_path / "missing.npz")


def test_every_setting_is_an_option_with_its_default():
    from spte.cli.migration.options import BY_KEY

    assert set(BY_KEY) | {"trace"} == set(DEFAULTS)
    assert plan_of({}).describe()["downtime_ns"] == 300_000_000
    with pytest.raises(ValueError, match="setting 'speed' is not known"):
        plan_of({"speed": 1})


@compiled
@pytest.mark.parametrize("platform", ["ept-pml", "ept-pml-rmap", "npt", "npt-rmap", "shadow"])
def test_under_a_nested_guests_stress_it_is_blocked_until_the_stress_stops(capsys, platform):
    """64 MiB that L2 writes eight times as fast as the link is."""
    argv = ["--workload", "stress", "--memory", "64M", "--rate", "1GB/s", "--bandwidth", "1Gbit", "--nested", "--stop-at", "30s"]
    code, out, err = spte(capsys, "migrate", *argv, "--platform", platform, "--vcpus", "2", "--json")
    assert (code, err) == (0, "")
    (one,) = json.loads(out)["runs"]
    busy = [r for r in one["rounds"] if r["start_ns"] + r["duration_ns"] <= 30 * 10**9]
    assert len(busy) > 50
    assert all(r["remaining"] == 64 << 8 for r in busy)
    assert one["converged"]
    assert 30 * 10**9 < one["total_ns"] < 32 * 10**9
    assert one["lost"]["pages"] == 0
    assert (one["source"]["pending"], one["source"]["logging_slots"]) == (0, 0)
    assert one["source"]["huge_after"] == one["source"]["huge_before"] == 2 * 32


@compiled
@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_the_how_to_commands_work_as_printed(tmp_path, command):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-eu", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") > 4
    assert len(list(tmp_path.iterdir())) == sum(map(command.count, ("--plot", "--report", "-o ")))


@compiled
@pytest.mark.parametrize(("command", "text"), SHOWN)
def test_what_a_page_shows_is_what_its_command_prints(capsys, command, text):
    assert spte(capsys, *command.split()[1:]) == (0, text, "")


@compiled
def test_the_how_to_from_python_works(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", HOW_TO, re.DOTALL)
    exec(compile(block, "docs/migrate.md", "exec"), {})
    assert "Downtime(" in capsys.readouterr().out


def test_one_run_converges_and_one_does_not_until_it_is_throttled():
    told = {param.values[0]: "- converged" in param.values[1] for param in SHOWN}
    assert told["spte migrate redis --bandwidth 1Gbit --markdown"]
    assert not told["spte migrate redis --bandwidth 300Mbit --markdown"]
    assert told["spte migrate redis --bandwidth 300Mbit --throttle auto-converge --markdown"]
