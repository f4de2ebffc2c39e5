"""The commands of docs/record.md and of the corpus work as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from record_targets import needs_tracking

from bench import corpus, record_overhead
from spte.record.measure import Costs
from spte.trace import SHIPPED, TraceError, load, shipped

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "record.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
MAX_SHIPPED = 1_500_000


def test_the_readme_shows_commands_that_are_run_here():
    shown = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (redis,) = [block for block in shown if "spte record" in block]
    assert redis in BLOCKS
    assert [line for line in redis.splitlines() if line.startswith("spte ")][-1] == "spte profile redis.npz"


@pytest.mark.long
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.search(r"-o (\w+)", block)[1])
def test_the_how_to_commands_work_as_printed(tmp_path, block):
    needs_tracking()
    if "redis" in block and not (shutil.which("redis-server") and shutil.which("redis-benchmark")):
        pytest.skip("needs redis-server and redis-tools")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", "-eu", "-c", block]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    (trace,) = tmp_path.iterdir()
    assert load(trace).nepochs > 1


def test_the_cost_table_has_every_cost():
    shown = re.search(re.escape(record_overhead.START) + r"\n(.*?)\n" + record_overhead.END, TEXT, re.DOTALL)[1].splitlines()
    made = record_overhead.table(Costs(1, 2, 3, 4)).splitlines()
    assert [line.split("|")[1] for line in shown[1:]] == [line.split("|")[1] for line in made[1:]]
    assert all(float(line.split("|")[2]) > 0 for line in shown[2:])


def test_shipped_traces_are_whole_and_small():
    for name in SHIPPED:
        assert shipped(name).writes > 100_000
        assert (ROOT / "spte" / "data" / f"{name}.npz").stat().st_size < MAX_SHIPPED
        assert name in corpus.PROGRAMS
    with pytest.raises(TraceError, match="there are redis, sqlite"):
        shipped("mysql")


def test_the_corpus_names_packages_that_are_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda binary: None)
    assert corpus.main([str(tmp_path), "redis", "memcached"]) == 4
    assert "apt install memcached redis-server redis-tools" in capsys.readouterr().err
    assert corpus.main([str(tmp_path), "mysql"]) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", corpus.PROGRAMS)
def test_the_programs_of_the_corpus_are_recorded(tmp_path, name):
    needs_tracking()
    if absent := corpus.missing([name]):
        pytest.skip(f"not installed: {absent}")
    assert corpus.main([str(tmp_path), name]) == 0
    assert load(tmp_path / f"{name}.npz").writes > 10_000
