"""Baselines beside the kernels: the same work in C, on plain arrays, against the limit that the kernels are held to."""

import dataclasses

import numpy as np
import pytest

from bench.c_loops import c_loops, pointer
from spte.limits import cases as ratios
from spte.limits.measure import Case


@pytest.fixture
def loops():
    found = c_loops()
    if found is None:
        pytest.skip("no C compiler: install cc, gcc or clang")
    return found


def in_c(case: Case, name: str, work) -> Case:
    """Return `case` with `work` in C in place of the kernel, on the limit's arrays."""
    return dataclasses.replace(case, name=f"C: {name}", work=work, setup=case.limit_setup, at_most=None)


def test_write_protect_in_c(compare, guest, loops):
    size = guest.pages
    compare(in_c(ratios.write_protect(guest), "clear W and count", lambda: loops.protect(pointer(guest.flat), size)))


@pytest.mark.parametrize("fraction", [0.5, 0.01])
def test_trailing_zeros_loop_in_c(compare, guest, loops, fraction):
    shift = int(guest.vm.mmu.mode[0].lay.dirty_shift)
    args = pointer(guest.flat), pointer(guest.words), pointer(guest.out), len(guest.words), shift
    compare(in_c(ratios.harvest(guest, fraction), f"trailing zeros, {100 * fraction:g} %", lambda: loops.rearm(*args)))


def test_scatter_in_c(compare, guest, loops):
    case = ratios.guest_writes(guest, logs=False)
    gfns = ratios.random_gfns(guest, 1 << 22)
    bit = np.uint64(guest.dirty_bit())
    compare(in_c(case, "a[gfn] |= D", lambda: loops.scatter(pointer(guest.flat), pointer(gfns), len(gfns), int(bit))))
