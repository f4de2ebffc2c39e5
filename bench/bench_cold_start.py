"""What a fresh process pays before its first result: the import, and kernels from the cache."""

import subprocess
import sys

IMPORT = "import time, numba; t = time.perf_counter(); import spte; print(time.perf_counter() - t)"
WARM = "import time, spte.warm; t = time.perf_counter(); spte.warm.warmup(); print(time.perf_counter() - t)"


def fresh(code: str) -> float:
    """Return the seconds that `code` prints in a process of its own."""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def best(benchmark, code: str, name: str) -> None:
    fresh(code)
    found = []
    benchmark.pedantic(lambda: found.append(fresh(code)), rounds=3)
    benchmark.extra_info.update(name=name, unit="process", units=1, ns_per_unit=min(found) * 1e9)


def test_import_over_numba(benchmark):
    best(benchmark, IMPORT, "import spte, numba imported before")


def test_every_kernel_from_the_cache(benchmark):
    best(benchmark, WARM, "first call of every kernel, from the cache")
