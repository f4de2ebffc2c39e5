"""What a fresh process pays before its first result: the import, kernels from the cache, and without one. The bars are times."""

import os
import subprocess
import sys

import pytest

from bench.conftest import best
from spte._numba import jit as _jit

IMPORT = "import time, numba; t = time.perf_counter(); import spte; print(time.perf_counter() - t)"
WARM = "import time, spte.warm; t = time.perf_counter(); spte.warm.warmup(); print(time.perf_counter() - t)"
# numba's own start, paid by the first kernel of any package, is counted by itself: spte's smallest kernel pays it.
START = """
import time
import numpy as np
from spte.bits import is_link

start = time.perf_counter()
is_link(np.uint64(0))
print(time.perf_counter() - start)
"""
PROFILE = """
import contextlib, io, time

start = time.perf_counter()
from spte.cli.app import run
with contextlib.redirect_stdout(io.StringIO()):
    assert run(["profile"]) == 0
print(time.perf_counter() - start)
"""
SLOWEST = """
import time
import numpy as np
from numba.core.caching import Cache
import spte.warm
from spte.bits import is_link

is_link(np.uint64(0))
load, took = Cache.load_overload, []

def timed(*args):
    start = time.perf_counter()
    found = load(*args)
    took.append(time.perf_counter() - start)
    return found

Cache.load_overload = timed
spte.warm.warmup()
print(max(took))
"""


@pytest.fixture(scope="module", autouse=True)
def bytecode(tmp_path_factory):
    """Processes find the bytecode that one before them left, as after an installation, whatever the environment says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        yield


def fresh(code: str, **env: str) -> float:
    """Return the seconds that `code` prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **env})
    return float(done.stdout)


def test_import_over_numba(benchmark):
    fresh(IMPORT)
    why = "a third of it is a full garbage collection of numba's objects, which falls into it"
    best(benchmark, "import spte, numba imported before", lambda: fresh(IMPORT), 0.06, why=why)


def test_every_kernel_from_the_cache(benchmark):
    fresh(WARM)
    best(benchmark, "warm-up: every kernel, from the cache", lambda: fresh(WARM), None)


@pytest.mark.skipif(_jit.CACHE_DIR is None, reason="no compile cache to load from")
def test_slowest_first_call_from_the_cache(benchmark):
    fresh(WARM)
    why = "it is the guest's run with the faults of the shadow MMU, the largest kernel"
    best(benchmark, "slowest first call of a kernel, from the cache, numba started", lambda: fresh(SLOWEST), 0.005, why=why)


@pytest.mark.skipif(_jit.CACHE_DIR is None, reason="no compile cache to load from")
def test_start_of_numba(benchmark):
    fresh(WARM)
    best(benchmark, "first call of all: numba starts", lambda: fresh(START), None)


@pytest.mark.skipif(_jit.PLAIN, reason="nothing is compiled in plain Python")
def test_compilation_of_everything(benchmark, tmp_path):
    why = "half in numba's Python, which types and lowers all functions, half in LLVM, with what several kernels share once in each"
    best(benchmark, "compilation of every kernel", lambda: fresh(WARM, SPTE_CACHE_DIR=str(tmp_path)), 25.0, rounds=1, why=why)


@pytest.mark.skipif(_jit.PLAIN, reason="nothing is compiled in plain Python")
def test_the_first_profile_ever(benchmark, tmp_path):
    why = "it compiles the kernels that it calls"
    best(benchmark, "first spte profile: kernels compiled", lambda: fresh(PROFILE, SPTE_CACHE_DIR=str(tmp_path)), 10.0, rounds=1, why=why)
