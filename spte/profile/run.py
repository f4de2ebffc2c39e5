"""What dirty logging costs: a workload through one VM for each column, phase by phase.

The phases are those of the kernel selftest dirty_log_perf_test: populate, enable logging, then per iteration the
guest's accesses and a harvest, at last disable logging. A harvest is

* bitmap, manual protect off: GET_DIRTY_LOG of every slot (it re-arms the pages it reports);
* bitmap, manual protect on: GET_DIRTY_LOG of every slot, then CLEAR_DIRTY_LOG of the whole slot, or chunk by chunk, with what GET
  gave; with initially-set the first one reports every page;
* dirty ring: collect all dirty entries, then RESET_DIRTY_RINGS; also whenever a full ring stops a vCPU.

If logging begins with the slots, enabling comes first, and what populating wrote is harvested before the first iteration.

Counts are exact and depend on nothing but the arguments, but for `Row.threads`: on demand the guest runs once more, on a VM of its own,
with vCPUs on threads that go on during harvests. Seconds are how long this library took on this machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from spte.policy import Policy, parse
from spte.profile.columns import LOG_FROM, Column, Log, check_chunk
from spte.profile.phases import Plan, Run
from spte.profile.report import Row
from spte.profile.threads import ThreadedRun
from spte.profile.workload import Workload, check_choice
from spte.warm import steps_of, warmup

DIRECT = ("ept-pml", "ept-nopml", "ept-noad", "npt", "npt-pml")
"""The platforms with two-dimensional paging."""
Progress = Callable[[int, int, str], None]
"""Called as progress(done, total, what): steps done, steps in all, the platform and policy at work."""


def profile(
    workload: Workload,
    platforms: Sequence[str] = DIRECT,
    policies: Sequence[str | Policy] = ("6.12",),
    *,
    logs: Sequence[Log] = (),
    backings: Sequence[str] = (),
    clear_chunk: int | None = None,
    log_from: str = "populated",
    threads: bool = False,
    progress: Progress | None = None,
) -> list[Row]:
    """Run `workload` on a fresh VM for every platform, policy, way to log and kind of host memory.

    Parameters
    ----------
    workload : Workload
        `spte.profile.workload.TraceWorkload`, `spte.profile.perf_test.PerfTest`, or anything of that shape.
    platforms : sequence of str
        Platform names.
    policies : sequence of str or Policy
        Policies as `spte.policy.parse` reads them, or values.
    logs : sequence of Log
        Ways to log; by default the workload's own.
    backings : sequence of str
        Kinds of host memory; by default the workload's own.
    clear_chunk : int, optional
        Pages that one CLEAR takes, a multiple of 64; by default a whole slot.
    log_from : str
        ``"populated"``: logging begins when every page was written; ``"creation"``: with the slots.
    threads : bool
        Also run the guest with its vCPUs on threads: `Row.threads`.
    progress : callable, optional
        Called as ``progress(done, total, what)`` after each step.

    Returns
    -------
    list of Row
        One a column: for each policy, of it each way to log, of that each kind of memory, the platforms in the order given.

    Raises
    ------
    KvmError
        If a platform, policy, backing or ring size is refused; raised before the first run.
    WorkloadError
        If `clear_chunk` or `log_from` is refused.
    """
    chosen = [parse(p) if isinstance(p, str) else p for p in policies]
    logs = logs or (Log(workload.manual, workload.ring_bytes),)
    backings = backings or (workload.backing,)
    check_choice("log_from", log_from, LOG_FROM)
    if clear_chunk is not None:
        check_chunk(clear_chunk)
    columns = [Column(*each) for each in ((p, policy, log, b) for policy in chosen for log in logs for b in backings for p in platforms)]
    plan = Plan(clear_chunk, log_from == "creation")
    for column in columns:
        Run(workload, column, plan).vm.close()
    prepare(columns, threads=threads)
    per_run = workload.nepochs + 2
    rows = []
    for i, column in enumerate(columns):

        def step(done: int, first: int = i * (1 + threads) * per_run, what: str = " ".join((column.platform, column.policy.name))) -> None:
            if progress is not None:
                progress(first + done, len(columns) * (1 + threads) * per_run, what)

        with (run := Run(workload, column, plan)).vm:
            row = run.row(step)
        rows.append(_with_threads(row, workload, plan, step) if threads else row)
    return rows


def _with_threads(row: Row, workload: Workload, plan: Plan, step: Callable[[int], None]) -> Row:
    """Return `row` with what its column does when vCPUs are on threads; its steps follow those that are done."""
    with (run := ThreadedRun(workload, row.column, plan)).vm:
        return dataclasses.replace(row, threads=run.measure(lambda done: step(workload.nepochs + 2 + done)))


def prepare(columns: Sequence[Column], *, threads: bool = False) -> None:
    """Compile, or load, the kernels that runs of `columns` call, so that no phase is timed with it."""
    rings = any(column.log.ring_bytes for column in columns)
    warmup(steps=steps_of((column.policy for column in columns), rings=rings, threads=threads))
