"""From a pattern to a trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spte._arguments import instance, integer
from spte.access import WRITE
from spte.generate.patterns import Pattern
from spte.platform import PAGE_SIZE
from spte.profile.perf_test import PerfTest
from spte.trace import MAX_NPAGES, PAGES_PER_2M, Trace, TraceError
from spte.trace.build import INTERVAL_NS, check_interval
from spte.trace.collect import MAX_EPOCHS, MAX_WRITES, Collector

SECONDS = 5
MAX_SEED = (1 << 64) - 1


def generate(
    pattern: Pattern,
    *,
    memory: int = 1 << 30,
    rate: int = 500_000_000,
    duration_ns: int = SECONDS * 10**9,
    interval_ns: int = INTERVAL_NS,
    seed: int = 0,
) -> Trace:
    """Return a trace of writes by a pattern.

    Parameters
    ----------
    pattern : Pattern
        One of `spte.generate.PATTERNS`, made with its parameters.
    memory : int
        Memory of the guest in bytes, a multiple of 2 MiB.
    rate : int
        Bytes written in a second, 4096 a write. A page that is written twice in an epoch is dirty once, so that what
        is dirtied can be less.
    duration_ns : int
        Length of the trace, a multiple of `interval_ns`.
    interval_ns : int
        Length of an epoch.
    seed : int
        Seed of all that is random.

    Returns
    -------
    Trace
        The same for the same arguments.

    Raises
    ------
    TraceError
        If a parameter is out of range.
    """
    instance(pattern, "pattern", Pattern, "one that spte.generate.PATTERNS makes, such as PATTERNS['uniform']()")
    for name, value in (("memory", memory), ("rate", rate), ("duration_ns", duration_ns), ("interval_ns", interval_ns), ("seed", seed)):
        integer(value, name, TraceError)
    check_interval(interval_ns)
    if memory <= 0 or memory % (PAGES_PER_2M * PAGE_SIZE) or memory // PAGE_SIZE > MAX_NPAGES:
        raise TraceError(f"memory={memory}; take a multiple of 2 MiB up to {MAX_NPAGES // PAGES_PER_2M * PAGES_PER_2M * PAGE_SIZE}")
    if rate < 1:
        raise TraceError(f"rate={rate}; take 1 byte a second or more")
    if duration_ns < interval_ns or duration_ns % interval_ns or duration_ns // interval_ns > MAX_EPOCHS:
        raise TraceError(f"duration_ns={duration_ns} is not 1 to {MAX_EPOCHS} times interval_ns={interval_ns}; take a multiple")
    if not 0 <= seed <= MAX_SEED:
        raise TraceError(f"seed={seed}; take 0 to {MAX_SEED}")
    npages, epochs = memory // PAGE_SIZE, duration_ns // interval_ns
    if rate * interval_ns // 10**9 // PAGE_SIZE > MAX_WRITES:
        raise TraceError(f"rate={rate} is more than {MAX_WRITES} writes an epoch; take less, or a shorter interval")
    collected = Collector()
    for epoch in range(epochs):
        first, last = (e * interval_ns * rate // (10**9 * PAGE_SIZE) for e in (epoch, epoch + 1))
        pages = pattern.pages(epoch, first, last, npages, np.random.default_rng([seed, epoch]))
        collected.add(epoch, pages.astype(np.uint64))
    told = {**dataclasses.asdict(pattern), "memory": memory, "rate": rate, "seed": seed}
    return collected.trace(interval_ns, npages=npages, meta={"command": _spelled(pattern.name(), told), "how": "spte generate"})



def perf_test(test: PerfTest, *, interval_ns: int = INTERVAL_NS) -> Trace:
    """Return the writes of dirty_log_perf_test: an epoch an iteration, in which vCPUs touch all their memory.

    Parameters
    ----------
    test : PerfTest
        The selftest's options.
    interval_ns : int
        How long an iteration lasts.

    Returns
    -------
    Trace
        The pages that any vCPU writes in each iteration; what is only read is not there.
    """
    instance(test, "test", PerfTest, "a spte.profile.perf_test.PerfTest")
    check_interval(integer(interval_ns, "interval_ns", TraceError))
    collected = Collector()
    for iteration in range(test.nepochs):
        collected.add(iteration, np.empty(0, np.uint64))
        for access in test.epoch(iteration):
            collected.add(iteration, access.gfns if access.kinds is None else access.gfns[access.kinds == WRITE])
    options = test.describe()
    told = {name: options[name] for name in ("vcpus", "bytes_per_vcpu", "write_percent", "random_access", "overlap", "seed")}
    return collected.trace(interval_ns, npages=test.npages, meta={"command": _spelled("perf-test", told), "how": "spte generate"})


def _spelled(name: str, parameters: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])
