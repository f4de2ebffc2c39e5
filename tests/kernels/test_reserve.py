"""How much memory a guest takes, measured in a process of its own: above what the import and the warm-up hold."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spte._numba import jit as _jit

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(_jit.PLAIN, reason="takes hours in plain Python"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]
MIB = 1 << 20
HEAD = """
import numpy as np
import spte, spte.warm
spte.warm.warmup()

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

before = peak()
"""
SMALL_LEAVES = """
pages, batch = {size} >> 12, 1 << 23
vm = spte.VM("ept-pml")
backing = spte.Backing("4k", {size}, populate=True)
vm.set_memory_region(0, 0, {size}, backing)
vm.set_memory_region(0, 0, {size}, backing, flags=1)
for start in range(0, pages, batch):
    vm.vcpus[0].write(np.arange(start, min(start + batch, pages)))
assert vm.mmu.tables.kvm[0].pages[0] == pages
print(peak() - before)
"""
UNTOUCHED = """
vm = spte.VM("npt")
half = 6 << 40
for slot in range(2):
    vm.set_memory_region(slot, slot * half, half, spte.Backing("4k", half))
print(peak() - before)
"""


def taken(code: str) -> int:
    """Return the bytes that `code` adds to the peak of its process."""
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_1_tib_of_small_leaves_takes_at_most_2_3_gib():
    assert taken(SMALL_LEAVES.format(size=1 << 40)) <= 2.3 * 1024 * MIB


def test_12_tib_in_two_slots_with_nothing_touched_take_at_most_50_mib():
    assert taken(UNTOUCHED) <= 50 * MIB
