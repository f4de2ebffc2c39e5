"""A large batch, whose tables are listed and looked up, does what small ones do."""

from __future__ import annotations

import numpy as np
import pytest

import spte
from spte.cpu.run import LEAST_TO_LIST

SIZE = 16 << 20
PAGES = SIZE >> 12
MANY = 8 * LEAST_TO_LIST


def guest(platform: str, policy: str) -> tuple[spte.VM, spte.Backing]:
    vm, backing = spte.VM(platform, policy), spte.Backing("thp", SIZE)
    for flags in (0, 1, 0):
        vm.set_memory_region(0, 0, SIZE, backing, flags=flags)
        vm.vcpus[0].write(np.arange(PAGES // 2))
    return vm, backing


def state(vm: spte.VM, log: np.ndarray) -> list[object]:
    # A run ends with an exit and a PML drain, so these depend on how many runs there are.
    counted = {name: count for name, count in vm.counters().items() if name not in ("exits", "pml_full")}
    return [vm.leafs(), vm.tables(), counted, log.tolist()]


@pytest.mark.parametrize("platform", ["ept-pml", "ept-noad", "npt", "npt-pml"])
@pytest.mark.parametrize("policy", ["5.11", pytest.param("6.12", marks=pytest.mark.long), "6.13"])
@pytest.mark.parametrize("logs", [0, 1])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_large_batch_does_what_small_ones_do(platform, policy, logs, mixed):
    rng = np.random.default_rng(3)
    gfns = rng.integers(0, PAGES, MANY)
    kinds = (1 << rng.integers(0, 3, MANY)).astype(np.uint8) if mixed else np.full(MANY, spte.WRITE, np.uint8)
    got = []
    for size in (MANY, 100):
        vm, backing = guest(platform, policy)
        with vm:
            vm.set_memory_region(0, 0, SIZE, backing, flags=logs)
            for start in range(0, MANY, size):
                if mixed:
                    vm.vcpus[0].run(gfns[start : start + size], kinds[start : start + size])
                else:
                    vm.vcpus[0].write(gfns[start : start + size])
            vm.check()
            got.append(state(vm, vm.get_dirty_log(0) if logs else np.zeros(0)))
    assert got[0] == got[1]
