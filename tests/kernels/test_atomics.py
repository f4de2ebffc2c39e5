"""Atomic operations: what they do, and that threads which use them on one word lose nothing."""

import numba
import numpy as np
import pytest

from spte._numba import atomics
from spte._numba import jit as _jit
from spte.arrays.tables import SharedTables, Tables

compiled = numba.jit(nopython=True, nogil=True)  # plain Python in that lane
TIMES = 200 if _jit.PLAIN else 200_000


@compiled
def each_once(words, index, bits):
    """Do every operation on one word; returns what each said."""
    added = atomics.fetch_add(words, index, bits)
    ored = atomics.fetch_or(words, index, bits << np.uint64(8))
    anded = atomics.fetch_and(words, index, ~bits)
    swapped = atomics.swap(words, index, bits)
    failed = atomics.compare_exchange(words, index, swapped, np.uint64(0))
    done = atomics.compare_exchange(words, index, bits, bits + bits)
    atomics.relax()
    seen = atomics.load(words, index)
    atomics.store(words, index, seen + bits)
    return added, ored, anded, swapped, failed, done, seen


@compiled
def add_by_exchange(words, times):
    """Add one to a word, and set and take a bit of another."""
    one = np.uint64(1)
    for _ in range(times):
        old = atomics.load(words, 0)
        while atomics.compare_exchange(words, 0, old, old + one) != old:
            old = atomics.load(words, 0)
        atomics.fetch_add(words, 1, one)


@compiled
def shares(t):
    """Tell of which variant a kernel is."""
    return atomics.is_shared(t)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_each_operation_returns_what_the_word_was(shape):
    words = np.zeros(shape, np.uint64)
    words.flat[3] = 1
    said = [int(value) for value in each_once(words, 3, np.uint64(4))]
    assert said == [1, 5, 0x405, 0x401, 4, 4, 8]
    assert words.reshape(-1).tolist() == [0, 0, 0, 12]


def test_threads_lose_no_addition(pool):
    words = np.zeros(2, np.uint64)
    for thread in [pool.submit(add_by_exchange, words, TIMES) for _ in range(4)]:
        thread.result(60)
    assert words.tolist() == [4 * TIMES] * 2


def test_a_kernel_knows_whether_its_arrays_are_shared():
    fields = [np.zeros(1, np.int64)] * len(Tables._fields)
    assert not shares(Tables(*fields))
    assert shares(SharedTables(*fields))
