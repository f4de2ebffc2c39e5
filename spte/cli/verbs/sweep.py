"""`spte sweep`: migrations with all combinations of options, on all cores or a Dask cluster, kept as they finish."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from spte._version import __version__
from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_MISSING, EXIT_OK, EXIT_TERMINATED
from spte.cli.migration.options import axis, combinations, spelled, with_settings
from spte.cli.migration.text import Axis, listing, short
from spte.cli.params import announce_compilation, target
from spte.cli.progress import steps_bar
from spte.migrate.settings import STRESS
from spte.sweep import Journal, Sweep, SweepError, recommend
from spte.sweep import sweep as run_sweep
from spte.sweep.points import Figures, WorkerError

SCHEMA = "spte-sweep/1"

HELP = """Migrations with all combinations of options, over one or many traces; see `spte migrate` for what each of them does.

--vary names an option and its values; other options hold for all points. They run in one process a CPU, or on a Dask cluster:
start `dask scheduler` and `dask worker ADDRESS` where this package is installed, and name the scheduler's address.

\b
  spte sweep redis sqlite --vary bandwidth=1Gbit,10Gbit --vary log=bitmap,manual,ring --cost guess -o sweep.parquet
  spte sweep redis --vary platform=ept-pml,npt --vary throttle=none,auto-converge --bandwidth 300Mbit --recommend
  spte sweep redis --vary bandwidth=1Gbit,10Gbit --scheduler tcp://127.0.0.1:8786 -o sweep.parquet

With -o each point is kept in FILE.parquet.journal as soon as it is finished, and the same command goes on where a killed
one stopped; at the end they are in FILE.parquet, a row a point, and the journal is gone. Exit code 1: a page was lost.
"""


@click.command(help=HELP, short_help="Many migrations: all combinations of options.")
@click.argument("traces", nargs=-1, metavar="[TRACE]...")
@click.option("--workload", type=click.Choice(["trace", STRESS]), default="trace", show_default=True)
@click.option("--vary", "axes", type=axis, multiple=True, metavar="OPTION=V,V", help="An option and its values; repeatable.")
@with_settings
@click.option("-o", "result", type=target(".parquet"), metavar="FILE.parquet", help="Keep the result there; needs pyarrow.")
@click.option("--workers", type=click.IntRange(1, 4096), help="Processes on this host. Default: one a CPU.")
@click.option("--scheduler", metavar="ADDRESS", help="Dask scheduler, such as tcp://127.0.0.1:8786; needs distributed.")
@click.option("--recommend", "wants_best", is_flag=True, help="Name the best point of each trace.")
@click.option("--report", type=target(".html"), metavar="FILE.html", help="Write a page of pictures and tables; needs plotly.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print a Markdown table.")
def sweep(
    traces: tuple[str, ...],
    workload: str,
    axes: tuple[Axis, ...],
    result: Path | None,
    workers: int | None,
    scheduler: str | None,
    wants_best: bool,
    report: Path | None,
    style: str | None,
    **options: Any,
) -> int:
    """Check every option, do what is not done yet, print, and return the exit code."""
    if workload == STRESS and traces:
        raise click.UsageError(f"{traces[0]!r} with --workload stress: one of both says what the guest writes; take one")
    if workers is not None and scheduler is not None:
        raise click.UsageError(f"--workers {workers} and --scheduler {scheduler}: the cluster has its own workers; take one")
    base = {name: value for name, value in options.items() if value is not None}
    named = tuple(dict.fromkeys(traces)) or (STRESS if workload == STRESS else "redis",)
    points = combinations((("trace", named), *axes), base)
    plan = Sweep(points)
    if report:
        from spte.cli.html.migration import many
        from spte.cli.html.page import write
    announce_compilation()
    try:
        with _heeding_sigterm():
            figures = _figures(plan, result, workers, scheduler)
    except _Terminated:
        click.echo("spte: terminated", err=True)
        return EXIT_TERMINATED
    except WorkerError as error:
        click.echo(f"spte sweep: {error}", err=True)
        return EXIT_MISSING
    except SweepError as error:
        raise click.UsageError(str(error)) from None
    best = recommend(points, figures) if wants_best else {}
    keys = [key for key in ("trace", *(key for key, _ in axes)) if key != "trace" or len(named) > 1 or not axes]
    if style == "json":
        runs = [{"settings": point, **found} for point, found in zip(points, figures, strict=True)]
        told: dict[str, Any] = {"schema": SCHEMA, "spte_version": __version__, "points": runs}
        click.echo(json.dumps({**told, **({"recommended": best} if wants_best else {})}, indent=1, allow_nan=False))
    else:
        click.echo(listing(keys, points, figures, markdown=style == "markdown"))
        for line in _recommended(best, keys, points, figures):
            click.echo(line)
    if report:
        lines = _recommended(best, keys, points, figures)
        write(report, f"spte sweep: {', '.join(named)}"[:120], lines, many(keys, points, figures, axes if len(named) == 1 else ()))
    lost = [point for point, found in zip(points, figures, strict=True) if found["lost_pages"]]
    for point in lost:
        click.echo(f"spte sweep: pages were lost with {point}; run `spte migrate` with these options", err=True)
    return EXIT_DIFFERENCE if lost else EXIT_OK


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is done here as SIGINT does: by an exception, so that no process of the sweep stays behind."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.getsignal(signal.SIGTERM)
    if before != signal.SIG_DFL:  # it is ignored, or the caller's business
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _figures(plan: Sweep, result: Path | None, workers: int | None, scheduler: str | None) -> list[Figures]:
    """Return the figures of each point: from the file if it is there, else done here."""
    if result is None:
        with steps_bar() as progress:
            return run_sweep(plan, workers=workers, scheduler=scheduler, progress=progress)
    from spte.sweep import parquet

    if result.exists():
        return parquet.read(plan, result)
    with ExitStack() as stack:
        progress = stack.enter_context(steps_bar())
        journal = stack.enter_context(Journal(result.with_name(result.name + ".journal"), plan.digest))
        figures = run_sweep(plan, workers=workers, scheduler=scheduler, journal=journal, progress=progress)
        parquet.write(plan, figures, result)
        journal.remove()
    return figures


def _recommended(
    best: Mapping[str, int | None], keys: Sequence[str], points: Sequence[Mapping[str, Any]], figures: Sequence[Figures]
) -> list[str]:
    lines = [""] if best else []
    for trace, index in best.items():
        if index is None:
            lines.append(f"recommended for {trace}: none, no point converges; vary the bandwidth or a throttle")
            continue
        chosen = ", ".join(f"{key} {spelled(key, points[index][key])}" for key in keys if key != "trace")
        stall = figures[index]["stall_ns"]
        estimated = "" if stall is None else f", estimated guest stall {stall / 1e6:.3g} ms"
        lines.append(f"recommended for {trace}: {chosen}: {short(figures[index])}{estimated}")
    return lines
