"""What the machine can do: loops that touch the same memory as a kernel and nothing else. A kernel is measured against one of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spte._numba.jit import ctz, kernel, prefetch
from spte.arrays.records import I64s, U64s
from spte.arrays.tables import Tables
from spte.bits import ONE, PRESENT_SHIFT, U64, W_SHIFT, ZERO
from spte.kernels._entries import clear_entries
from spte.mmu.walk import leaf_table


@kernel
def rearm_by_zeros(sptes: U64s, bitmap: U64s, out: U64s, shift: np.uint64) -> np.int64:
    """Harvest by counting trailing zeros: move `bitmap` to `out` and clear bit `shift` of its entries; returns entries changed."""
    changed = ZERO
    for w in range(bitmap.shape[0]):
        mask = bitmap[w]
        out[w] = mask
        bitmap[w] = ZERO
        while mask != ZERO:
            j = (w << 6) + ctz(mask)
            mask &= mask - ONE
            s = sptes[j]
            d = (s >> shift) & (s >> PRESENT_SHIFT) & ONE
            changed += d
            sptes[j] = s ^ (d << shift)
    return np.int64(changed)


@kernel
def any_set(words: U64s) -> np.uint64:
    """Read an array once."""
    seen = ZERO
    for w in range(words.shape[0]):
        seen |= words[w]
    return seen


@kernel
def scatter_or(sptes: U64s, gfns: I64s, bit: np.uint64) -> None:
    """``sptes[gfn] |= bit`` for each gfn in order."""
    for i in range(gfns.shape[0]):
        sptes[U64(gfns[i])] |= bit


@kernel
def scatter_store(sptes: U64s, gfns: I64s, value: np.uint64) -> None:
    """``sptes[gfn] = value`` for each gfn in order."""
    for i in range(gfns.shape[0]):
        sptes[U64(gfns[i])] = value


@kernel
def scatter_bits(bitmap: U64s, gfns: I64s) -> None:
    """Set the bit of each gfn in order."""
    for i in range(gfns.shape[0]):
        gfn = U64(gfns[i])
        bitmap[gfn >> U64(6)] |= ONE << (gfn & U64(63))


@kernel
def read_first(sptes: U64s, parents: U64s, ahead: np.int64) -> None:
    """``parents[row] = sptes[512 * row]`` for each row, prefetched `ahead` rows before."""
    for row in range(parents.shape[0]):
        prefetch(sptes, min(row + ahead, parents.shape[0] - 1) * 512)
        parents[row] = sptes[U64(row) << U64(9)]


@kernel
def protect_by_walk(t: Tables, root: np.int64, start: np.int64, end: np.int64) -> np.int64:
    """Take W from the 4 KiB leaves of gfns ``[start, end)``, multiples of 512, each table found by a walk; returns SPTEs changed."""
    changed = np.int64(0)
    for gfn in range(start, end, 512):
        row = leaf_table(t, root, gfn)
        if row >= 0:
            changed += clear_entries(t.flat, row * 512, row * 512 + 512, W_SHIFT, W_SHIFT, False, False)
    return changed


@kernel
def set_bits(t: Tables, bits: np.uint64) -> None:
    """Set `bits` in every entry of every level-1 table: makes a mutating kernel find its work again."""
    for row in range(t.kvm[0].rows):
        if t.pages[row].level == 1:
            for j in range(512):
                t.sptes[U64(row), j] |= bits


def sweep(sptes: U64s, mask: np.uint64) -> npt.NDArray[np.uint64]:
    """NumPy in place: ``sptes &= mask``."""
    return np.bitwise_and(sptes, mask, out=sptes)
