"""Every interleaving of small programs, up to a number of preemptions: no write is lost, and each step left out loses one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from interleave.mutants import MUTANTS
from interleave.programs import PROGRAMS

TESTS = Path(__file__).parents[1]
# By which program, within two preemptions, each mutant is caught.
CATCHES = {
    "bit after protect": "PML, dirty", "return before flush": "write-protected, clean", "kick left out": "write-protected, dirty",
    "plain store for compare-and-exchange": "write-protected, aged", "bitmap read, then zeroed": "write-protected, clean",
    "bit set by a plain store": "write-protected, CLEAR", "page marked before its SPTE": "write-protected, clean",
    "confirmed between look and store": "write-protected, dirty", "entry not announced": "absent",
}  # fmt: skip


def explored(bound, program, mutant=""):
    """Explore in a process in which kernels are plain Python."""
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    call = [sys.executable, "-m", "interleave", str(bound), mutant, program]
    done = subprocess.run(call, env=env, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loses_nothing(found):
    assert found["schedules"] > 1
    assert not found["failure"], f"{found['failure']}\n{found['schedule']}"


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_write_is_lost_with_one_preemption(program):
    loses_nothing(explored(1, program))


@pytest.mark.long
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_write_is_lost_with_three_preemptions(program):
    loses_nothing(explored(3, program))


@pytest.mark.parametrize("mutant", ["return before flush", "kick left out"])
def test_a_harvest_that_does_not_wait_loses_a_write(mutant):
    assert explored(1, CATCHES[mutant], mutant)["failure"].startswith("lost write")


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_step_left_out_loses_a_write_and_the_schedule_is_told(mutant):
    found = explored(2, CATCHES[mutant], mutant)
    assert found["failure"].startswith("lost write")
    assert {line.split()[0] for line in found["schedule"].splitlines()} == {"vCPU", "harvest"}
