"""A migration by plain values, as they stand in JSON: what grids and sweeps vary, keep and send to other processes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from spte._arguments import index
from spte.cost import Costs
from spte.cost import load as load_costs
from spte.generate import PATTERNS, generate
from spte.migrate.plan import MOST, MigrateError, Plan
from spte.platform import PAGE_SIZE
from spte.profile.workload import TraceWorkload
from spte.trace import PAGES_PER_2M, Trace, named
from spte.trace.collect import MAX_EPOCHS

STRESS = "stress"
"""In place of a trace: writes to one page after the other, over all memory, again and again."""
STRESS_MEMORY = 1 << 30
STRESS_RATE = 4_000_000_000
GUEST = ("vcpus", "backing", "order", "seed")
_INTERVAL_NS = 10_000_000

DEFAULTS: Mapping[str, Any] = {
    "trace": "redis", "rate": STRESS_RATE, "memory": None, "vcpus": 1, "backing": "thp", "order": "random", "seed": 0, "cost": None,
    **{field.name: field.default for field in dataclasses.fields(Plan) if field.name not in ("workload", "costs")},
}  # fmt: skip
"""Every setting and its default: the parameters of `Plan` and of `TraceWorkload`, `trace` (a file, or a name that ships, or `STRESS`),
the `rate` of `STRESS` (bytes a second), `memory` of the guest (bytes), and the name of its `cost`s."""


def plan_of(settings: Mapping[str, Any], *, trace: Trace | None = None, costs: Costs | None = None) -> Plan:
    """Return the migration that `settings` describe; what they leave out is in `DEFAULTS`.

    Parameters
    ----------
    settings : mapping
        Values by name.
    trace : Trace, optional
        What the setting of that name names, where it has been read already.
    costs : Costs, optional
        What the setting `cost` names, likewise.

    Raises
    ------
    MigrateError, WorkloadError, TraceError, CostError
        If one of them is out of range or unknown, or a file can not be read.
    """
    if unknown := [name for name in settings if name not in DEFAULTS]:
        raise MigrateError(f"setting {unknown[0]!r} is not known; take one of {', '.join(DEFAULTS)}")
    chosen = {**DEFAULTS, **settings}
    cost, memory = chosen.pop("cost"), chosen.pop("memory")
    name, rate = chosen.pop("trace"), chosen.pop("rate")
    if not 1 <= index(rate, "rate") <= MOST:
        raise MigrateError(f"rate={rate} bytes/s; take 1 to {MOST}")
    if trace is None:
        trace = stress(rate, memory) if name == STRESS else load_trace(name)
    pages = None if memory is None else memory // PAGE_SIZE
    if memory is not None and memory % (PAGES_PER_2M * PAGE_SIZE):
        raise MigrateError(f"memory={memory} is not a multiple of 2 MiB; round it")
    work = TraceWorkload(trace, pages, **{name: chosen.pop(name) for name in GUEST})
    if costs is None and cost is not None:
        costs = load_costs(cost).costs
    return Plan(work, costs=costs, **chosen)


@functools.lru_cache(maxsize=4)
def load_trace(name: str) -> Trace:
    """Return a trace that ships or that is a file; TraceError if there is none."""
    return named(name)


@functools.lru_cache(maxsize=4)
def stress(rate: int, memory: int | None) -> Trace:
    """Return one lap of `STRESS` over `memory` bytes at `rate` bytes a second, in whole epochs; MigrateError or TraceError if not."""
    memory = STRESS_MEMORY if memory is None else memory
    epochs = max(1, -(-memory * 10**9 // (rate * _INTERVAL_NS)))
    if epochs > MAX_EPOCHS:
        least = -(-memory * 10**9 // (MAX_EPOCHS * _INTERVAL_NS))
        raise MigrateError(
            f"rate={rate} bytes/s takes {epochs * _INTERVAL_NS // 10**9} s to write memory={memory} bytes once; "
            f"take a rate of {least} or more, or less memory"
        )
    return generate(PATTERNS["sequential"](), memory=memory, rate=rate, duration_ns=epochs * _INTERVAL_NS, interval_ns=_INTERVAL_NS)
