"""What a fresh process pays before its first result: the import, kernels from the cache, and without one. The bars are times."""

import os
import subprocess
import sys

import pytest

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


def best(benchmark, name: str, run, at_most_s: float | None, rounds: int = 9, why: str = "") -> None:
    found = []
    benchmark.pedantic(lambda: found.append(run()), rounds=rounds)
    info = {"name": name, "unit": "process", "units": 1, "ns_per_unit": min(found) * 1e9}
    if at_most_s is not None:
        ratio = min(found) / at_most_s
        limit = {"limit": f"{at_most_s:g} s", "limit_ns_per_unit": at_most_s * 1e9}
        info |= limit | {"ratio": ratio, "at_most": 1.0, "met": ratio <= 1.0, "why": why}
    benchmark.extra_info.update(info)


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
    best(benchmark, "slowest first call of a kernel, from the cache, numba started", lambda: fresh(SLOWEST), 0.005)


@pytest.mark.skipif(_jit.CACHE_DIR is None, reason="no compile cache to load from")
def test_start_of_numba(benchmark):
    fresh(WARM)
    best(benchmark, "first call of all: numba starts", lambda: fresh(START), None)


@pytest.mark.skipif(_jit.PLAIN, reason="nothing is compiled in plain Python")
def test_compilation_of_everything(benchmark, tmp_path):
    why = "half in numba's Python, which types and lowers 250 functions, half in LLVM, with what several kernels share once in each"
    best(benchmark, "compilation of every kernel", lambda: fresh(WARM, SPTE_CACHE_DIR=str(tmp_path)), 25.0, rounds=1, why=why)
