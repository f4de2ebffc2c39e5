"""`spte profile`: a workload through every platform side by side."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.metrics import as_json
from spte.cli.params import announce_compilation, size, spell_size, target
from spte.platform import PAGE_SIZE, named
from spte.policy import parse
from spte.profile.perf_test import SOURCES, PerfTest
from spte.profile.report import Row
from spte.profile.run import DIRECT, Progress
from spte.profile.run import profile as run_profile
from spte.profile.workload import BACKINGS, MANUALS, ORDERS, TraceWorkload, Workload, WorkloadError
from spte.trace import SHIPPED, TraceError, default_trace, load, shipped

BYTES_PER_PAGE = 8 * 513 / 512 + 2 / 8 + 1
"""Memory of a guest mapped at 4 KiB: the SPTE and its share of upper tables, two bitmaps, one flag of the check."""

INITIALLY_SET = 3
"""The argument of --manual that has KVM_DIRTY_LOG_INITIALLY_SET."""
RING_ARMS_NOTHING = (
    "spte profile: with initially-set (--manual 3) logging arms no page when it starts, in KVM too: the first CLEAR of each does, "
    "and a dirty ring has no CLEAR; take --manual 0 or 1 with --ring"
)

HELP = """What dirty logging costs for a program's writes, on every platform side by side.

Takes a write trace (spte-trace/1, a .npz) and lets a guest perform it: populate (a write to every page), enable dirty
logging, then for each epoch of the trace its writes and a harvest, at last disable. TRACE is a file, such as
`spte record` writes, or one of two that ship in the package: sqlite (in memory, 54 epochs of 50 ms), which is taken
without TRACE, and redis (under redis-benchmark, 100 ms). Counts are exact. The last figures of a table are
measured on this machine: how fast this library, not a kernel, does the same work. Every page written must be reported
by the harvest of its epoch; if one is not, the exit code is 1.

\b
  spte profile
  spte profile redis.npz --platform ept-pml --platform npt --policy 6.12 --policy 6.1
  spte profile --policy 6.12,eager_page_split=N --plot cost.png
  spte profile --memory 1T --platform ept-pml
  spte profile --vcpus 4 --ring 64K --json > report.json
  spte profile --workload perf-test -v 4 -b 1G -s anonymous_hugetlb_1gb -w 50 -i 3
  spte profile --limits --memory 1T

Larger guests: page p of the guest is written in an epoch if the trace wrote page p modulo its own size, so the written
share of memory stays the trace's. --scale N takes N times the trace's memory, --memory SIZE just that size; the copy
at the end of memory is cut off.

With `--workload perf-test` the letters of the kernel's dirty_log_perf_test say what the guest does, with their
defaults; they are refused without it, as the trace's options are with it.
"""

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
@click.option("--backing", type=click.Choice(BACKINGS), help="Host memory. Default thp.")
@click.option(
    "--manual",
    type=click.Choice([str(m) for m in MANUALS]),
    help="Manual protect: 1 ENABLE, 3 with INITIALLY_SET (not with --ring); harvest of bitmaps is then GET + CLEAR. Default 0.",
)
@click.option("--ring", "ring_bytes", type=size, help="Dirty ring of each vCPU, bytes; harvest: collect + reset.")
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
@click.option("--limits", is_flag=True, help="Instead: each kernel beside what this machine can do. --memory: 64G.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print Markdown tables.")
@click.option("--output", type=target(), metavar="FILE", help="Print there instead of stdout.")
@click.option("--plot", type=target(".png", ".svg"), metavar="FILE.png", help="Draw the epochs and the costs.")
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
    limits: bool,
    **options: Any,
) -> int:
    """Check every option, run, print, and return the exit code."""
    if limits:
        from spte.cli.limits import refuse_others, show

        refuse_others(click.get_current_context())
        return show(memory, style, output)
    platforms = tuple(dict.fromkeys(platforms)) or DIRECT
    policies = tuple(dict.fromkeys(policies)) or ("6.12",)
    for platform in platforms:
        named(platform)
    for policy in policies:
        parse(policy)
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    try:
        if workload == "perf-test":
            work: Workload = _perf_test(given, seed, {"TRACE": trace, "--scale": scale, "--memory": memory})
        else:
            work = _traced(given, seed, trace, scale, memory)
    except (TraceError, WorkloadError) as error:
        raise click.UsageError(str(error)) from None
    _refuse_too_large(work)
    if style != "json":
        importlib.import_module("spte.cli.table")  # what the host lacks is said before the work
    if plot:
        from spte.cli.plot import draw
    announce_compilation()
    with _progress() as progress:
        rows = run_profile(work, platforms, policies, progress=progress)
    _print(work, rows, style, output)
    if plot:
        draw(rows, _title(work), plot)
    return _report_losses(work, rows)


def _traced(
    given: dict[str, Any], seed: int, path: Path | None, scale: int | None, memory: int | None
) -> TraceWorkload:
    _refuse({PERF_OPTIONS[name] for name in given if name not in TRACE_OPTIONS}, "needs --workload perf-test")
    if scale is not None and memory is not None:
        raise click.UsageError(f"--scale {scale} and --memory {memory} both give the guest's size; take one")
    if scale is not None and scale < 1:
        raise click.UsageError(f"--scale {scale}; take 1 or more")
    if memory is not None and memory % PAGE_SIZE:
        raise click.UsageError(f"--memory {memory} is not a multiple of 2 MiB; round it")
    trace = default_trace() if path is None else shipped(str(path)) if str(path) in SHIPPED else load(path)
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


def _refuse_too_large(work: Workload) -> None:
    need = work.npages * BYTES_PER_PAGE
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise click.UsageError(
            f"a guest of {spell_size(work.npages * PAGE_SIZE)} may need {spell_size(need)} for its page tables and "
            f"this host has {spell_size(have)}; take less than {spell_size(have / BYTES_PER_PAGE * PAGE_SIZE)}"
        )


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """Yield what shows progress on stderr, or None when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        yield show


def _title(work: Workload) -> str:
    about = work.describe()
    memory = spell_size(work.npages * PAGE_SIZE)
    log = f"ring of {work.ring_bytes} bytes" if work.ring_bytes else f"bitmap, manual {work.manual}"
    name = about["command"] if about["kind"] == "trace" else "dirty_log_perf_test"
    return f"{name}\n{memory} on {work.backing}, {work.nepochs} epochs, {work.vcpus} vCPU, {log}"


def _print(work: Workload, rows: list[Row], style: str | None, output: Path | None) -> None:
    if style == "json":
        text = json.dumps(as_json(work, rows), indent=1, allow_nan=False) + "\n"
    else:
        from spte.cli.table import markdown, plain

        color = output is None and sys.stdout.isatty()
        text = markdown(rows) if style == "markdown" else f"{_title(work)}\n\n{plain(rows, color=color)}"
    if output:
        output.write_text(text)
    else:
        click.echo(text, nl=False)


def _report_losses(work: Workload, rows: list[Row]) -> int:
    for row in rows:
        if row.lost:
            index, epoch = next((i, e) for i, e in enumerate(row.epochs) if e.lost)
            click.echo(
                f"spte profile: {row.platform}, policy {row.policy}: {row.lost} pages were written and not reported, "
                f"first gfn {epoch.first_lost} in epoch {index}",
                err=True,
            )
    if not any(row.lost for row in rows):
        return EXIT_OK
    if work.ring_bytes and work.manual == INITIALLY_SET:
        click.echo(RING_ARMS_NOTHING, err=True)
    return EXIT_DIFFERENCE
