"""Array types, and record dtypes: structs whose fields kernels and their plain-Python twins both read as ``array[i].field``."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

U64s = npt.NDArray[np.uint64]
I64s = npt.NDArray[np.int64]
Records = npt.NDArray[Any]  # of one of the dtypes that `record` makes


def _field(i: int) -> property:
    def store(struct: Any, value: Any) -> None:
        struct[i] = value

    return property(itemgetter(i), store)  # `np.record` finds a field ten times as slowly


def record(name: str, fields: list[tuple[Any, ...]]) -> np.dtype[Any]:
    """Return the dtype of struct `name`, laid out as C does; `fields` as for `np.dtype`, which may be such structs or subarrays."""
    struct = np.dtype(fields, align=True)
    return np.dtype((type(name, (np.void,), {field[0]: _field(i) for i, field in enumerate(fields)}), struct))


def columns(dtype: str, *names: str) -> list[tuple[str, str]]:
    """Return fields `names`, all of `dtype`."""
    return [(name, dtype) for name in names]
