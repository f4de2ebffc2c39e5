"""Doing the points of a sweep: in processes of this host, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from spte.policy import parse
from spte.sweep.journal import Journal
from spte.sweep.points import Figures, SchedulerError, Sweep, WorkerError, measure, name_of_trace
from spte.warm import steps_of, warmup

CONNECT_S = 5
GO_ON = "run the same command again: with -o it goes on where it stopped"

Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what)."""


def sweep(
    plan: Sweep,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> list[Figures]:
    """Do every point of `plan` that `journal` does not have.

    Parameters
    ----------
    plan : Sweep
        What to do.
    workers : int, optional
        Processes on this host; by default one a CPU.
    scheduler : str, optional
        Address of a Dask scheduler, whose workers do it instead.
    journal : Journal, optional
        Where each point is kept as soon as it is finished.
    progress : callable, optional
        Called as ``progress(done, total, what)``.

    Returns
    -------
    list of dict
        Figures of each point, in the order of the points.

    Raises
    ------
    SchedulerError
        There is no scheduler at that address, or it lost its workers.
    WorkerError
        A process on this host died.
    ModuleNotFoundError
        `scheduler` without the package distributed.
    """
    done = dict(journal.done) if journal is not None else {}
    left = [index for index in range(len(plan.points)) if index not in done]
    if left:
        finished = _on_cluster(plan, left, scheduler) if scheduler is not None else _here(plan, left, workers)
        for index, figures in finished:
            done[index] = figures
            if journal is not None:
                journal.add(index, figures)
            if progress is not None:
                progress(len(done), len(plan.points), "sweep")
    return [done[index] for index in range(len(plan.points))]


def _here(plan: Sweep, left: list[int], workers: int | None) -> Iterator[tuple[int, Figures]]:
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    workers = min(workers, len(left))
    if workers <= 1:
        yield from ((index, measure(plan.points[index], *plan.inputs(plan.points[index]))) for index in left)
        return
    policies = (parse(str(plan.setting(index, "policy"))) for index in left)
    rings = any(plan.setting(index, "log") == "ring" for index in left)
    warmup(steps=steps_of(policies, rings=rings))  # once, before all of them want it
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, plan.points[index], *plan.inputs(plan.points[index])): index for index in left}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise WorkerError(f"a process of this sweep died, of too little memory or by a signal; {GO_ON}") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _on_cluster(plan: Sweep, left: list[int], address: str) -> Iterator[tuple[int, Figures]]:
    import distributed

    try:
        # Before there is a client: one of an address that can not be right would wait, and complain, until it is collected.
        distributed.comm.get_address_host_port(distributed.comm.normalize_address(address), strict=True)
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        why = " ".join(str(error).split())[:80]
        raise SchedulerError(f"no Dask scheduler answers at {address!r} ({why}); start one: dask scheduler") from None
    with client, client.as_current():
        # Each trace travels once to each worker that needs it.
        sent = {name: client.scatter(trace, direct=False) for name, trace in plan.traces.items()}
        futures: dict[Any, int] = {}
        for index in left:
            point = plan.points[index]
            trace, costs = plan.inputs(point)
            given = sent[name_of_trace(point)] if trace is not None else None
            futures[client.submit(measure, dict(point), given, costs, key=f"spte-{plan.digest}-{index}", retries=2)] = index
        for future in distributed.as_completed(futures):
            try:
                yield futures[future], future.result()
            except distributed.KilledWorker as error:
                raise SchedulerError(f"the cluster lost the workers that did a point ({error.task}); {GO_ON}") from None
            future.release()
