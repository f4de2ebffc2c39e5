"""Doing the points of a sweep: in processes of this host, or on a Dask cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import Connection

from spte.policy import parse
from spte.sweep.journal import Journal
from spte.sweep.points import GO_ON, Figures, Sweep, WorkerError, measure
from spte.warm import steps_of, warmup

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
        There is no scheduler at that address; it died; it has no worker, or lost those that did a point.
    WorkerError
        A process on this host died.
    ModuleNotFoundError
        `scheduler` without the package distributed.
    """
    done = dict(journal.done) if journal is not None else {}
    left = [index for index in range(len(plan.points)) if index not in done]
    if left:
        with closing(_here(plan, left, workers) if scheduler is None else _there(plan, left, scheduler)) as finished:
            for index, figures in finished:
                done[index] = figures
                if journal is not None:
                    journal.add(index, figures)
                if progress is not None:
                    progress(len(done), len(plan.points), "sweep")
    return [done[index] for index in range(len(plan.points))]


def _there(plan: Sweep, left: list[int], scheduler: str) -> Generator[tuple[int, Figures], None, None]:
    from spte.sweep.cluster import on_cluster

    return on_cluster(plan, left, scheduler)


def _here(plan: Sweep, left: list[int], workers: int | None) -> Generator[tuple[int, Figures], None, None]:
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    workers = min(workers, len(left))
    if workers <= 1:
        yield from ((index, measure(plan.points[index], *plan.inputs(plan.points[index]))) for index in left)
        return
    policies = (parse(str(plan.setting(index, "policy"))) for index in left)
    rings = any(plan.setting(index, "log") == "ring" for index in left)
    warmup(steps=steps_of(policies, rings=rings))  # once, before all of them want it
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    with watched, held, ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with, initargs=(watched,)) as pool:
        futures = {pool.submit(measure, plan.points[index], *plan.inputs(plan.points[index])): index for index in left}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise WorkerError(f"a process of this sweep died, of too little memory or by a signal; {GO_ON}") from None
        except BaseException:
            held.close()  # what they still do, nobody wants
            pool.shutdown(cancel_futures=True)
            raise


def _end_with(watched: Connection) -> None:
    """Let this process of the pool end when the other end of `watched` is closed: by the sweep, or with its process, however it died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all of them; the sweep's process heeds it
    threading.Thread(target=_wait_and_end, args=(watched,), daemon=True).start()


def _wait_and_end(watched: Connection) -> None:
    watched.poll(None)
    os._exit(1)
