"""Doing the points of a sweep on a Dask cluster."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import distributed

from spte.sweep.points import GO_ON, Figures, SchedulerError, Sweep, measure, name_of_trace
from spte.trace import Trace

CONNECT_S = 5
WORKERS_S = 15
"""How long a scheduler may be without workers: one that has just been started takes a few seconds to come."""
_LOOK_S = 0.02
NO_DASK = "what listens there does not speak Dask's protocol"


def on_cluster(plan: Sweep, left: list[int], address: str) -> Generator[tuple[int, Figures], None, None]:
    """Do the points `left` on the workers of the Dask scheduler at `address`; yields the number and the figures of each that is finished.

    Raises
    ------
    SchedulerError
        There is no scheduler at that address; it died; it has no worker, or lost those that did a point.
    """
    _ask(address)
    with _quiet(), distributed.Client(address, timeout=CONNECT_S, set_as_default=False) as client:
        try:
            yield from _results(client, _submit(client, plan, left), address)
        except (CancelledError, asyncio.CancelledError, distributed.comm.CommClosedError):
            raise SchedulerError(f"the Dask scheduler at {address!r} died, or dropped this sweep; {GO_ON}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client from telling by tracebacks what is raised here in one line."""
    logger = logging.getLogger("distributed.client")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _submit(client: Any, plan: Sweep, left: list[int]) -> dict[Any, int]:
    import dask  # not before distributed: where both are missing, that is the package to be named

    # A trace is a task's result: the worker that does the task gets it from the scheduler, others from that worker, each once, and if
    # all of them die, the task is done again. What is scattered would be gone.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": 1 << 60}):
        sent = {name: client.submit(_given, trace, key=f"spte-{plan.digest}-trace-{name}") for name, trace in plan.traces.items()}
    futures = {}
    for index in left:
        point = plan.points[index]
        trace, costs = plan.inputs(point)
        given = sent[name_of_trace(point)] if trace is not None else None
        futures[client.submit(measure, dict(point), given, costs, key=f"spte-{plan.digest}-{index}", retries=2)] = index
    return futures


def _given(trace: Trace) -> Trace:
    return trace


def _results(client: Any, futures: dict[Any, int], address: str) -> Generator[tuple[int, Figures], None, None]:
    ready, since = distributed.as_completed(futures, loop=client.loop), time.monotonic()
    while ready.count():
        if ready.has_ready():
            future = next(ready)
            try:
                yield futures[future], future.result()
            except distributed.KilledWorker as error:
                raise SchedulerError(f"the cluster lost the workers that did a point ({error.task}); {GO_ON}") from None
            future.release()
            since = time.monotonic()
        elif time.monotonic() - since < WORKERS_S:
            time.sleep(_LOOK_S)
        elif client.nthreads():
            since = time.monotonic()
        else:
            raise SchedulerError(f"the Dask scheduler at {address!r} has no worker; start one: dask worker {address}; {GO_ON}")


def _ask(address: str) -> None:
    """Raise SchedulerError unless a scheduler answers at `address`: a client would wait without limit for what else listens there."""
    try:
        with ThreadPoolExecutor(1) as thread:  # the caller's own may have a loop that runs
            kind = thread.submit(asyncio.run, _kind_of(address)).result()
        why = "" if kind == "Scheduler" else f"a Dask {kind} does"
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:80] or NO_DASK  # a TimeoutError says nothing
    except Exception:  # what listens may answer anything
        why = NO_DASK
    if why:
        raise SchedulerError(f"no Dask scheduler answers at {address!r} ({why}); start one: dask scheduler")


async def _kind_of(address: str) -> object:
    distributed.comm.get_address_host_port(distributed.comm.normalize_address(address), strict=True)
    secured = distributed.Security().get_connection_args("client")
    async with distributed.rpc(address, timeout=CONNECT_S, connection_args=secured) as remote:
        return (await asyncio.wait_for(remote.identity(), CONNECT_S + 1)).get("type")
