"""Sweeps: every point once, whatever dies on the way, here and on a cluster; and what is refused."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commandline import refused, save_toy, spte

from spte.cli.migration.options import combinations
from spte.migrate import MigrateError, migrate
from spte.migrate.settings import DEFAULTS, plan_of
from spte.sweep import Journal, Sweep, SweepError, recommend, sweep
from spte.sweep.points import WorkerError, measure

pq = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'kvm-spte[data]'")


@pytest.fixture
def toy(tmp_path):
    return save_toy(tmp_path / "toy.npz")


def points_of(toy, *bandwidths):
    axes = [("bandwidth", tuple(bandwidths) or (10**6, 10**8)), ("log", ("bitmap", "ring")), ("cost", ("guess",))]
    return combinations(axes, {"trace": toy, "max_ns": 3 * 10**9})


# -- points


def test_a_point_is_what_migrate_does(toy):
    plan = Sweep(points_of(toy))
    assert sweep(plan, workers=1) == [migrate(plan_of(point)).figures() for point in plan.points]
    assert not set(DEFAULTS) & set(measure(plan.points[0], *plan.inputs(plan.points[0])))


def test_all_points_are_checked_before_the_first_is_done(toy):
    with pytest.raises(MigrateError, match=r"5\.10 has no dirty rings"):
        Sweep([{"trace": toy}, {"trace": toy, "policy": "5.10", "log": "ring"}])


def test_the_digest_tells_sweeps_apart_and_sees_a_trace_that_changed(toy):
    points = points_of(toy)
    first = Sweep(points)
    assert first.digest == Sweep(points_of(toy)).digest
    assert len({first.digest, Sweep(points[:-1]).digest, Sweep([{**p, "seed": 1} for p in points]).digest}) == 3
    (name, trace), changed = next(iter(first.traces.items())), Sweep(points)
    changed.traces[name] = dataclasses.replace(trace, gfn=trace.gfn + np.uint32(1))
    assert changed.digest != first.digest


def test_the_best_point_throttles_least_then_stalls_least():
    points = [{"trace": trace} for trace in "aaaab"]
    figures = [
        {"converged": ended, "throttle_percent": percent, "stall_ns": stall, "lost_pages": 0, "dirty_limit": None, "down_ns": 1,
         "total_ns": 1}
        for ended, percent, stall in [(False, 0, 0), (True, 20, 0), (True, 0, 5), (True, 0, 4), (False, 0, 0)]
    ]
    assert recommend(points, figures) == {"a": 3, "b": None}
    figures[3]["lost_pages"] = 1
    assert recommend(points, figures)["a"] == 2


# -- the journal


def test_what_is_in_the_journal_is_not_done_again(toy, tmp_path, monkeypatch):
    plan, path = Sweep(points_of(toy)), tmp_path / "journal"
    whole = sweep(plan, workers=1)
    with Journal(path, plan.digest) as journal:
        for index in (0, 2):
            journal.add(index, whole[index])
    with path.open("ab") as file:
        file.write(b'{"point": 3, "figures": {"conv')  # a kill in the middle of a line
    asked = []
    monkeypatch.setattr("spte.sweep.run.measure", lambda point, *inputs: asked.append(point) or measure(point, *inputs))
    with Journal(path, plan.digest) as journal:
        assert sweep(plan, workers=1, journal=journal) == whole
    assert asked == [plan.points[1], plan.points[3]]
    assert [json.loads(line)["point"] for line in path.read_text().splitlines()[1:]] == [0, 2, 1, 3]


def test_a_journal_of_another_sweep_or_of_none_or_in_use_is_refused(toy, tmp_path):
    path = tmp_path / "journal"
    with Journal(path, "one"), pytest.raises(SweepError, match="in use"):
        Journal(path, "one")
    with pytest.raises(SweepError, match="another sweep"):
        Journal(path, "two")
    for text in ("what is this\n", '{"format": "tape"}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(SweepError, match="no journal of a sweep"):
            Journal(path, "one")
        assert path.read_text() == text


@pytest.mark.long
def test_a_process_that_dies_is_named_and_what_is_finished_is_kept(toy, tmp_path):
    plan, path = Sweep(points_of(toy, *range(10**6, 10**6 + 4))), tmp_path / "journal"

    def kill(done, total, what):
        for process in multiprocessing.active_children():
            process.kill()

    with Journal(path, plan.digest) as journal, pytest.raises(WorkerError, match=r"died.*run the same command again"):
        sweep(plan, workers=2, journal=journal, progress=kill)
    with Journal(path, plan.digest) as journal:
        assert 0 < len(journal.done) < len(plan.points)
        assert len(sweep(plan, workers=1, journal=journal)) == len(plan.points)


COMMAND = [sys.executable, "-c", "import sys; from spte.cli.app import run; sys.exit(run(sys.argv[1:]))"]


def wait_for_lines(journal, process):
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(toy, result, *more):
    axes = ["--vary", "bandwidth=1MB/s,2MB/s,3MB/s", "--vary", "log=bitmap,ring", "--vary", "seed=0,1"]
    return ["sweep", toy, *axes, "--max-time", "10s", "--cost", "guess", "-o", str(result), "--workers", "2", *more]


@pytest.mark.long
def test_a_sweep_that_was_killed_goes_on_where_it_stopped(capsys, toy, tmp_path):
    result = tmp_path / "result.parquet"
    journal = tmp_path / "result.parquet.journal"
    argv = [*COMMAND, *command(toy, result)]
    killed = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for_lines(journal, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    kept = journal.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert not result.exists()
    code, out, err = spte(capsys, *command(toy, result))
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1 + 12
    assert not journal.exists()
    assert kept.count(b"\n") < 13
    rows = pq.read_table(result).to_pylist()
    assert [(row["bandwidth"], row["log"], row["seed"]) for row in rows] == [
        (b * 10**6, log, seed) for b in (1, 2, 3) for log in ("bitmap", "ring") for seed in range(2)
    ]
    for line in kept.splitlines()[1:]:
        told = json.loads(line)
        assert told["figures"].items() <= rows[told["point"]].items()
    assert spte(capsys, *command(toy, result)) == (0, out, "")  # it is finished: nothing is done


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_ended_takes_its_processes_along(toy, tmp_path, number):
    journal = tmp_path / "result.parquet.journal"
    argv = [*COMMAND, *command(toy, tmp_path / "result.parquet", "--vary", f"vcpus={','.join(map(str, range(1, 100)))}")]
    ended = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_lines(journal, ended)
    os.kill(ended.pid, number)
    out, _ = ended.communicate(timeout=20)  # until the last process that has the pipe is gone
    if number == signal.SIGTERM:
        assert (ended.returncode, out) == (143, "spte: terminated\n")
    else:
        assert ended.returncode == -signal.SIGKILL
    kept = journal.read_bytes()
    assert kept.endswith(b"\n")
    assert len(kept.splitlines()) >= 3


# -- the command


def test_the_command_lists_points_and_names_the_best(capsys, toy):
    argv = ["sweep", toy, "--vary", "bandwidth=1MB/s,1Gbit", "--vary", "platform=ept-pml,npt", "--workers", "1", "--max-time", "3s"]
    code, out, err = spte(capsys, *argv, "--recommend", "--cost", "guess")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0][:3] == ["bandwidth", "platform", "converged"]
    assert [row[3] for row in rows[1:5]] == ["no", "no", "yes", "yes"]
    assert out.splitlines()[-1].startswith(f"recommended for {toy}: bandwidth 1 Gbit/s, platform ept-pml: ")
    told = json.loads(spte(capsys, *argv, "--json")[1])
    assert (told["schema"], len(told["points"])) == ("spte-sweep/1", 4)
    assert told["points"][3]["settings"] == {"trace": toy, "max_ns": 3 * 10**9, "bandwidth": 125 * 10**6, "platform": "npt"}
    assert spte(capsys, *argv[:4], "--markdown", "--max-time", "1s")[1].startswith("| bandwidth | converged |")


def test_bad_input_is_one_line(capsys, toy, tmp_path):
    other, foreign = tmp_path / "other.parquet", tmp_path / "foreign.parquet"
    assert spte(capsys, "sweep", toy, "-o", other)[0] == 0
    assert "holds another sweep" in refused(capsys, "sweep", toy, "--seed", "1", "-o", other)
    foreign.write_text("not Parquet")
    assert "is no Parquet file" in refused(capsys, "sweep", toy, "-o", foreign)
    assert "does not end in .parquet" in refused(capsys, "sweep", toy, "-o", tmp_path / "x.csv")
    assert "take one" in refused(capsys, "sweep", toy, "--workers", "2", "--scheduler", "tcp://127.0.0.1:9")
    assert "--vary" in refused(capsys, "sweep", toy, "--vary", "speed=1")
    assert "more than 100000 combinations" in refused(
        capsys, "sweep", toy, *(w for option in ("seed", "vcpus") for w in ("--vary", f"{option}={','.join(map(str, range(1, 320)))}"))
    )
    assert "with --workload stress" in refused(capsys, "sweep", toy, "--workload", "stress")


@pytest.mark.parametrize(("argv", "told"), [
    (["--vary", "vcpu-dirty-limit=1MB/s,999999999999TB/s"], "vcpu_dirty_limit=999999999999000061149184 bytes/s; take 4096"),
    (["--vary", "policy=5.10,6.12", "--vary", "log=bitmap,ring"], "policy 5.10 has no dirty rings; log to bitmaps, or take a newer policy"),
    (["--log", "ring", "--vary", "ring=64K,1000"], "ring of 1000 bytes is not a power of two; take 16384"),
    (["--rate", "999999999999TB/s"], "rate="), (["--ring", "9999999P"], "ring_bytes="),
    (["--clear-chunk", f"64{'0' * 20}"], "clear_chunk="),
])  # fmt: skip
def test_a_point_that_can_not_be_done_is_refused_before_the_first_is(capsys, toy, tmp_path, argv, told):
    assert told in refused(capsys, "sweep", toy, *argv, "-o", tmp_path / "result.parquet")
    assert list(tmp_path.iterdir()) == [Path(toy)]


@pytest.mark.parametrize(("module", "extra", "argv"), [
    ("pyarrow", "data", ["-o", "result.parquet"]), ("distributed", "cluster", ["--scheduler", "tcp://127.0.0.1:9"]),
])  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(capsys, toy, monkeypatch, uninstall, tmp_path, module, extra, argv):
    monkeypatch.chdir(tmp_path)
    uninstall(module, "spte.sweep.parquet")
    monkeypatch.delattr("spte.sweep.parquet", raising=False)
    assert refused(capsys, "sweep", toy, *argv, code=4) == f"spte: this needs {module}; pip install 'kvm-spte[{extra}]'\n"
    assert list(tmp_path.iterdir()) == [Path(toy)]
