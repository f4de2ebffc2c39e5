"""The same loops in C, where a compiler is found: a check that the limits of `spte.limits.bare_loops` are no slower than they need be."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

SOURCE = """
#include <stddef.h>
#include <stdint.h>
uint64_t protect(uint64_t *sptes, size_t count)
{
    uint64_t changed = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t w = sptes[i] >> 1 & sptes[i] >> 11 & 1;
        changed += w;
        sptes[i] ^= w << 1;
    }
    return changed;
}
uint64_t rearm(uint64_t *sptes, uint64_t *bitmap, uint64_t *out, size_t words, unsigned shift)
{
    uint64_t changed = 0;
    for (size_t w = 0; w < words; w++) {
        uint64_t mask = out[w] = bitmap[w];
        bitmap[w] = 0;
        for (; mask; mask &= mask - 1) {
            uint64_t *s = sptes + 64 * w + __builtin_ctzll(mask);
            uint64_t d = *s >> shift & *s >> 11 & 1;
            changed += d;
            *s ^= d << shift;
        }
    }
    return changed;
}
void scatter(uint64_t *sptes, const int64_t *gfns, size_t count, uint64_t bit)
{
    for (size_t i = 0; i < count; i++)
        sptes[gfns[i]] |= bit;
}
"""
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


@cache
def c_loops() -> ctypes.CDLL | None:
    """Return the compiled loops; None where no C compiler is found."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as where:
        source, library = Path(where, "loops.c"), Path(where, "loops.so")
        source.write_text(SOURCE)
        subprocess.run([compiler, *FLAGS, "-o", str(library), str(source)], check=True, capture_output=True)
        loops = ctypes.CDLL(str(library))
    loops.protect.restype = loops.rearm.restype = ctypes.c_uint64
    loops.protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    loops.rearm.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
    loops.scatter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64)
    return loops


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    """Return the address of a C-contiguous array."""
    return ctypes.c_void_p(array.ctypes.data)
