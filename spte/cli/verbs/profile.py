"""`spte profile`: a workload through every platform side by side."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from spte._files import write_whole
from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.metrics import Report
from spte.cli.params import BYTES_PER_PAGE, announce_compilation, log_mode, refuse_too_large, size, target
from spte.cli.progress import steps_bar
from spte.cli.report import Wanted, render, title, verdict_of
from spte.cost import CostError, CostProfile, names
from spte.cost import load as load_costs
from spte.platform import PAGE_SIZE, named
from spte.policy import parse
from spte.profile.columns import LOG_FROM, Log, check_chunk, labels
from spte.profile.notes import notes
from spte.profile.perf_test import SOURCES, PerfTest
from spte.profile.report import Row
from spte.profile.run import DIRECT
from spte.profile.run import profile as run_profile
from spte.profile.workload import BACKINGS, MANUALS, ORDERS, TraceWorkload, Workload, WorkloadError
from spte.trace import PAGES_PER_2M, TraceError, default_trace
from spte.trace import named as trace_named

BYTES_PER_ACCESS = 8 + 1
"""Memory of an access that a thread repeats: gfn and kind."""

HELP = """What dirty logging costs for a program's writes, on every platform side by side.

Takes a write trace (spte-trace/1, a .npz) and lets a guest perform it: populate (a write to every page), enable dirty
logging, then for each epoch of the trace its writes and a harvest, at last disable. TRACE is a file, such as
`spte record` writes, or one of two that ship in the package: sqlite (in memory, 54 epochs of 50 ms), which is taken
without TRACE, and redis (under redis-benchmark, 100 ms). Counts are exact. The last figures of a table are
measured on this machine: how fast this library, not a kernel, does the same work. Every page written must be reported
by the harvest of its epoch; if one is not, the exit code is 1.

A table has a column for each platform, policy, way to log (--log) and host memory (--backing) given.

\b
  spte profile
  spte profile redis.npz --platform ept-pml --platform npt --policy 6.12 --policy 6.1
  spte profile --platform ept-pml --log bitmap --log manual --log initially-set --log ring=64K --pivot
  spte profile redis --platform ept-nopml --platform ept-pml --log bitmap --log ring=64K --cost matlack --recommend
  spte profile --platform ept-pml --eager Y --eager N --plot cost.png
  spte profile --memory 1T --platform ept-pml
  spte profile --vcpus 4 --ring 64K --json > report.json
  spte profile --platform npt --epochs --csv > epochs.csv
  spte profile --workload perf-test -v 4 -b 1G -s anonymous_hugetlb_1gb -w 50 -i 3
  spte profile --workload perf-test -v 4 -e --threads
  spte profile --limits --memory 1T

With --threads each column runs once more, on a VM of its own, with a thread for each vCPU: it performs the epoch over and
over while harvests follow one another, with -e also while logging is disabled. The table then has the writes/s during
harvest and how long a harvest waits for vCPUs. Counts of that run depend on timing and are marked ~; a lost page is exit
code 1 as ever. All other figures are those without --threads.

With --cost, counts times the costs of a machine give estimates: the CPU time that the guest's vCPUs lose in an epoch, the time
of the VMM's calls, the longest exclusive hold of mmu_lock. They are marked as such, and what each cost rests on stands in its file;
see docs/costs.md. JSON is spte-profile/2: since 1, rows name their `log` and `backing`, and `estimated`, `costs`,
`notes` and `threads` came.

Larger guests: page p of the guest is written in an epoch if the trace wrote page p modulo its own size, so the written
share of memory stays the trace's. --scale N takes N times the trace's memory, --memory SIZE just that size; the copy
at the end of memory is cut off.

With `--workload perf-test` the letters of the kernel's dirty_log_perf_test say what the guest does, with their
defaults; they are refused without it, as the trace's options are with it.
"""

MODES = ("manual", "ring_bytes", "no_manual_protect")
TRACE_OPTIONS = {"vcpus": "--vcpus", "backing": "--backing", "manual": "--manual", "ring_bytes": "--ring",
                 "order": "--order"}  # fmt: skip
PERF_OPTIONS = {"vcpus": "-v", "bytes_per_vcpu": "-b", "source": "-s", "overlap": "-o", "memslots": "-x",
                "write_percent": "-w", "random_access": "-a", "no_manual_protect": "-g",
                "run_while_disabling": "-e", "iterations": "-i"}  # fmt: skip


@click.command(help=HELP, short_help="What dirty logging costs for a program's recorded writes.")
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option(
    "--platform", "platforms", multiple=True, metavar="NAME",
    help=f"Repeatable; default: {' '.join(DIRECT)}. Also shadow, and NAME-rmap for tdp_mmu=N.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[,FIELD=VALUE]...",
    help="Kernel version, single decisions replaced; repeatable; default 6.12. See `spte policies`.",
)
@click.option("--vcpus", "-v", type=int, help="vCPUs; a trace's 2 MiB regions are dealt to them in turn. Default 1.")
@click.option("--backing", "backings", type=click.Choice(BACKINGS), multiple=True, help="Host memory; repeatable. Default thp.")
@click.option(
    "--log", "logs", type=log_mode, multiple=True, metavar="MODE",
    help="Way to log; repeatable: bitmap, manual (GET, then CLEAR), initially-set, ring=64K, ring=64K,manual. Default bitmap.",
)
@click.option("--log-from", type=click.Choice(LOG_FROM), default="populated", help="Logging begins when all is written, or with the slots.")
@click.option("--eager", type=click.Choice(["Y", "N"]), multiple=True, help="eager_page_split of each policy; repeatable.")
@click.option("--clear-chunk", type=int, metavar="PAGES", help="Pages of one CLEAR, a multiple of 64. Default: the slot.")
@click.option(
    "--manual",
    type=click.Choice([str(m) for m in MANUALS]),
    help="As --log: 1 manual, 3 initially-set; with --ring beside it. Default 0.",
)
@click.option("--ring", "ring_bytes", type=size, help="As --log ring=SIZE: dirty ring of each vCPU, bytes.")
@click.option("--order", type=click.Choice(ORDERS), help="Order of the writes inside an epoch. Default ascending.")
@click.option("--scale", type=int, help="Guest memory: this many times the trace's.")
@click.option("--memory", type=size, help="Guest memory in bytes, a multiple of 2M, such as 1T.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option("--workload", type=click.Choice(["trace", "perf-test"]), default="trace", show_default=True)
@click.option("-b", "bytes_per_vcpu", type=size, help="perf-test: memory of each vCPU. Default 1G.")
@click.option("-s", "source", type=click.Choice(list(SOURCES)), help="perf-test: host memory. Default anonymous.")
@click.option("-o", "overlap", is_flag=True, help="perf-test: all vCPUs touch all memory.")
@click.option("-x", "memslots", type=int, help="perf-test: number of memslots. Default 1.")
@click.option("-w", "write_percent", type=int, help="perf-test: percentage of touches that write. Default 100.")
@click.option("-a", "random_access", is_flag=True, help="perf-test: touch random pages.")
@click.option("-g", "no_manual_protect", is_flag=True, help="perf-test: no manual protect; GET clears.")
@click.option("-e", "run_while_disabling", is_flag=True, help="perf-test: vCPUs run on while logging is disabled.")
@click.option("-i", "iterations", type=int, help="perf-test: iterations. Default 2.")
@click.option("--threads", is_flag=True, help="Beside the exact run: vCPUs on threads that go on during harvests, and with -e disabling.")
@click.option("--limits", is_flag=True, help="Instead: each kernel beside what this machine can do. --memory: 64G.")
@click.option("--cost", metavar="NAME|FILE", help=f"Add estimates at these costs: {', '.join(names())}, or a TOML file.")
@click.option("--cost-range", is_flag=True, help="With --cost: the band of each estimate, too.")
@click.option("--recommend", is_flag=True, help="With --cost: the column of least estimated stall, and what would turn that.")
@click.option("--epochs", is_flag=True, help="Instead of the table: a line an epoch and column.")
@click.option("--pivot", is_flag=True, help="Turn the table: a line a column, a column a figure.")
@click.option("--csv", "style", flag_value="csv", help="With --epochs: print CSV.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print Markdown tables.")
@click.option("--output", type=target(stream=True), metavar="FILE", help="Print there instead of stdout.")
@click.option("--plot", type=target(".png", ".svg"), metavar="FILE.png", help="Draw the epochs and the costs.")
@click.option("--report", "page", type=target(".html"), metavar="FILE.html", help="Write a page of pictures and tables; needs plotly.")
def profile(
    trace: Path | None,
    platforms: tuple[str, ...],
    policies: tuple[str, ...],
    scale: int | None,
    memory: int | None,
    seed: int,
    workload: str,
    style: str | None,
    output: Path | None,
    plot: Path | None,
    page: Path | None,
    limits: bool,
    backings: tuple[str, ...],
    logs: tuple[Log, ...],
    log_from: str,
    eager: tuple[str, ...],
    clear_chunk: int | None,
    threads: bool,
    **options: Any,
) -> int:
    """Check every option, run, print, and return the exit code."""
    if limits:
        from spte.cli.limits import refuse_others, show

        refuse_others(click.get_current_context())
        return show(memory, style, output)
    wanted = Wanted(style, options.pop("epochs"), options.pop("pivot"), options.pop("cost_range"), options.pop("recommend"))
    if threads and wanted.epochs:
        raise click.UsageError("--threads adds to the table, which --epochs does not print; leave one out")
    costs = _costs(options.pop("cost"), wanted)
    platforms = tuple(dict.fromkeys(platforms)) or DIRECT
    policies = _policies(policies, eager)
    backings, logs = tuple(dict.fromkeys(backings)), tuple(dict.fromkeys(logs))
    for platform in platforms:
        named(platform)
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    if backings:
        given["backing"] = backings[0]
    _refuse({TRACE_OPTIONS.get(name, "-g") for name in given if logs and name in MODES}, "and --log both say how to log; take --log")
    try:
        if workload == "perf-test":
            work: Workload = _perf_test(given, seed, {"TRACE": trace, "--scale": scale, "--memory": memory})
        else:
            work = _traced(given, seed, trace, scale, memory)
        if clear_chunk is not None:
            check_chunk(clear_chunk)
    except (TraceError, WorkloadError) as error:
        raise click.UsageError(str(error)) from None
    _refuse_too_large(work, threads=threads)
    if style != "json":
        importlib.import_module("spte.cli.table")  # what the host lacks is said before the work
    if plot:
        from spte.cli.plot import draw
    if page:
        from spte.cli.html.page import write
        from spte.cli.html.profile import profile as page_sections
    announce_compilation()
    with steps_bar() as progress:
        rows = run_profile(
            work, platforms, policies, logs=logs, backings=backings, clear_chunk=clear_chunk, log_from=log_from, threads=threads,
            progress=progress,
        )  # fmt: skip
    report = Report(work, rows, notes(rows, clear_chunk), costs, wanted.band)
    text = render(report, wanted, color=output is None and sys.stdout.isatty())
    if output:
        write_whole(output, text)
    else:
        click.echo(text, nl=False)
    if plot:
        draw(rows, title(work, rows), plot)
    if page:
        heading = title(work, rows).splitlines()
        lines = [*heading, *report.notes, *(verdict_of(report) if wanted.recommend else [])]
        write(page, f"spte profile: {heading[0][:80]}", lines, page_sections(report))
    return _report_losses(rows)


def _costs(name: str | None, wanted: Wanted) -> CostProfile | None:
    """Return the costs to estimate by; refuse what does not go together."""
    if wanted.style == "csv" and not wanted.epochs:
        raise click.UsageError("--csv needs --epochs: a line an epoch and column")
    if wanted.pivot and (wanted.epochs or wanted.style == "json"):
        raise click.UsageError("--pivot turns the table, which --epochs and --json do not print; leave one out")
    if wanted.recommend and wanted.epochs:
        raise click.UsageError("--recommend stands below the table, which --epochs does not print; leave one out")
    if name is None:
        flags = {"--cost-range": wanted.band, "--recommend": wanted.recommend}
        _refuse({flag for flag, on in flags.items() if on}, f"needs --cost; take one of {', '.join(names())}, or a TOML file")
        return None
    try:
        return load_costs(name)
    except CostError as error:
        raise click.BadParameter(str(error), param_hint="--cost") from None


def _policies(policies: tuple[str, ...], eager: tuple[str, ...]) -> tuple[str, ...]:
    """Return the policies, each once for each value of --eager."""
    policies = tuple(dict.fromkeys(policies)) or ("6.12",)
    for policy in policies:
        parse(policy)
        if eager and "eager_page_split" in policy:
            raise click.UsageError(f"--policy {policy} and --eager both set eager_page_split; take one")
    return tuple(f"{policy},eager_page_split={value}" for policy in policies for value in dict.fromkeys(eager)) if eager else policies


def _traced(
    given: dict[str, Any], seed: int, path: Path | None, scale: int | None, memory: int | None
) -> TraceWorkload:
    _refuse({PERF_OPTIONS[name] for name in given if name not in TRACE_OPTIONS}, "needs --workload perf-test")
    if scale is not None and memory is not None:
        raise click.UsageError(f"--scale {scale} and --memory {memory} both give the guest's size; take one")
    if scale is not None and scale < 1:
        raise click.UsageError(f"--scale {scale}; take 1 or more")
    if memory is not None and memory % (PAGES_PER_2M * PAGE_SIZE):
        raise click.UsageError(f"--memory {memory} is not a multiple of 2 MiB; round it")
    trace = default_trace() if path is None else trace_named(str(path))
    pages = trace.npages * scale if scale is not None else memory and memory // PAGE_SIZE
    if "manual" in given:
        given["manual"] = int(given["manual"])
    return TraceWorkload(trace, pages, seed=seed, **given)


def _perf_test(given: dict[str, Any], seed: int, foreign: dict[str, Any]) -> PerfTest:
    wrong = {TRACE_OPTIONS[name] for name in given if name not in PERF_OPTIONS}
    wrong |= {name for name, value in foreign.items() if value is not None}
    _refuse(wrong, "is for traces; --workload perf-test takes -v -b -s -o -x -w -a -g -e -i and --seed")
    return PerfTest(seed=seed, **given)


def _refuse(options: set[str], why: str) -> None:
    if options:
        raise click.UsageError(f"{min(options)} {why}")


def _refuse_too_large(work: Workload, *, threads: bool) -> None:
    bytes_per_page = BYTES_PER_PAGE + BYTES_PER_ACCESS * threads * (work.vcpus if getattr(work, "overlap", False) else 1)
    refuse_too_large(work.npages, bytes_per_page)


def _report_losses(rows: Sequence[Row]) -> int:
    lost = False
    for label, row in zip(labels([row.column for row in rows]), rows, strict=True):
        lost |= row.lost > 0
        if row.threads is not None and row.threads.lost:
            lost = True
            what = f"{row.threads.lost} pages were written and not reported, first gfn {row.threads.first_lost}, with vCPUs on threads"
            click.echo(f"spte profile: {', '.join(label)}: {what}", err=True)
        if row.lost:
            harvests = {"populating": row.populated} if row.populated else {}
            harvests |= {f"epoch {i}": epoch for i, epoch in enumerate(row.epochs)}
            where, gfn = next((name, epoch.first_lost) for name, epoch in harvests.items() if epoch.lost)
            what = f"{row.lost} pages were written and not reported, first gfn {gfn} in {where}"
            click.echo(f"spte profile: {', '.join(label)}: {what}", err=True)
    return EXIT_DIFFERENCE if lost else EXIT_OK
