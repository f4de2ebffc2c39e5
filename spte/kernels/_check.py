"""Checks for arrays that come from outside, done once before a kernel runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from spte.arrays.records import U64s
from spte.bits import Layout, layout
from spte.platform import Platform, named


def plain(array: Any, name: str) -> U64s:
    """Return `array` if it is a writable C-contiguous uint64 array; TypeError or ValueError say what it is instead."""
    if not isinstance(array, np.ndarray) or array.dtype != np.uint64:
        raise TypeError(f"{name} is {getattr(array, 'dtype', type(array).__name__)}; pass an array of uint64")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"{name} with shape {array.shape} is not C-contiguous and writable; pass a copy")
    return array


def rows(array: Any, level: int) -> U64s:
    """Return `array` as rows of one table each (a last row of odd length stands alone in one row)."""
    if level not in (1, 2, 3):
        raise ValueError(f"level={level} is not 1 (4 KiB), 2 (2 MiB) or 3 (1 GiB)")
    flat = plain(array, "sptes").reshape(-1)
    return flat.reshape(-1, 512) if len(flat) % 512 == 0 else flat.reshape(1, -1)


def resolve(platform: str | Platform) -> Platform:
    """Return a platform given by name or value; PlatformError if the name is not known."""
    return named(platform) if isinstance(platform, str) else platform


def layout_of(platform: str | Platform) -> Layout:
    """Return the 6.12 layout of a platform given by name or value."""
    return layout(resolve(platform), "6.12")
