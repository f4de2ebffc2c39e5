"""Which point of a sweep is best for each trace."""

from __future__ import annotations

from collections.abc import Sequence

from spte.sweep.points import Figures, Settings


def recommend(points: Sequence[Settings], figures: Sequence[Figures]) -> dict[str, int | None]:
    """Return for each trace the number of its best point, None if none converges without a loss.

    Best is the least throttling; of those that throttle as little the least guest stall; then the shortest downtime, then total time;
    of equals the first.
    """
    best: dict[str, int | None] = {}
    for index, point in enumerate(points):
        trace = str(point["trace"])
        before = best.setdefault(trace, None)
        if _good(figures[index]) and (before is None or _rank(figures[index]) < _rank(figures[before])):
            best[trace] = index
    return best


def _good(one: Figures) -> bool:
    return bool(one["converged"]) and not one["lost_pages"]


def _rank(one: Figures) -> tuple[int, ...]:
    slowed = one["throttle_percent"] if one["dirty_limit"] is None else 100
    return slowed, one["stall_ns"] or 0, one["down_ns"], one["total_ns"]
