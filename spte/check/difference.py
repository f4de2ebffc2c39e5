"""How two records differ: in one value, or from one place on in a listing of runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Json = Any


class Difference(NamedTuple):
    """One value that differs. `gfn` and `level` are None where the value belongs to no place in the tables."""

    key: str
    expected: Json
    got: Json
    gfn: int | None = None
    level: int | None = None


class Place(NamedTuple):
    """The first place at which two listings differ, and what each has there (None: nothing)."""

    level: int
    gfn: int
    expected: Json
    got: Json


def first_in_runs(expected: Sequence[Sequence[Json]], got: Sequence[Sequence[Json]]) -> Place | None:
    """Return the first place at which two listings ``[level, gfn, count, value...]`` differ, None if none.

    How a listing is merged into runs does not matter; its order does.
    """
    left, right = _heads(expected), _heads(got)
    a, b = next(left, None), next(right, None)
    while a is not None and b is not None:
        if (a[0], a[1], a[3]) != (b[0], b[1], b[3]):
            same_place = a[:2] == b[:2]
            a_first = same_place or (a[1], -a[0]) < (b[1], -b[0])
            b_first = same_place or not a_first
            level, gfn = (a if a_first else b)[:2]
            return Place(level, gfn, _shown(a[3]) if a_first else None, _shown(b[3]) if b_first else None)
        count = min(a[2], b[2])
        step = count << 9 * (a[0] - 1)
        a = (a[0], a[1] + step, a[2] - count, a[3]) if a[2] > count else next(left, None)
        b = (b[0], b[1] + step, b[2] - count, b[3]) if b[2] > count else next(right, None)
    if a is None and b is None:
        return None
    level, gfn, _, value = a or b  # type: ignore[misc]
    return Place(level, gfn, _shown(value) if a else None, _shown(value) if b else None)


def _heads(runs: Sequence[Sequence[Json]]) -> Iterator[tuple[int, int, int, tuple[Json, ...]]]:
    for run in runs:
        level, gfn, count, *value = run
        if count > 0:
            yield level, gfn, count, tuple(value)


def _shown(value: tuple[Json, ...]) -> Json:
    return value[0] if len(value) == 1 else list(value)
