"""What a call of the VM costs where it has next to nothing to do: most of it is Python and the arrays it hands to a kernel."""

import timeit

import numpy as np

import spte
from bench.conftest import best

SIZE, CALLS = 1 << 20, 1000
WHY = "a call of a kernel takes apart the arrays it is given, the rest is Python: checks, the lock, the slot"


def small_vm():
    """Return a VM with one small slot that logs, all of it written."""
    vm, backing = spte.VM("ept-pml"), spte.Backing("4k", SIZE)
    vm.set_memory_region(0, 0, SIZE, backing)
    vm.vcpus[0].write(np.arange(SIZE >> 12))
    vm.set_memory_region(0, 0, SIZE, backing, flags=1)
    return vm


def test_get_of_a_small_clean_slot(benchmark):
    with small_vm() as vm:
        out = np.zeros(SIZE >> 18, np.uint64)
        get = lambda: vm.get_dirty_log(0, out)  # noqa: E731
        get()
        best(benchmark, "GET_DIRTY_LOG of a small clean slot", lambda: timeit.timeit(get, number=CALLS) / CALLS, 4e-6, rounds=25, why=WHY)


def test_write_of_one_page(benchmark):
    with small_vm() as vm:
        page, vcpu = np.array([5]), vm.vcpus[0]
        write = lambda: vcpu.write(page)  # noqa: E731
        write()
        best(benchmark, "write of one page", lambda: timeit.timeit(write, number=CALLS) / CALLS, 4e-6, rounds=25, why=WHY)
