"""`spte record`: which pages a program writes, epoch by epoch, into a trace."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from spte.cli.exit_codes import EXIT_MISSING, EXIT_OK
from spte.cli.params import spell_size, target
from spte.platform import PAGE_SIZE
from spte.record.errors import MissingPieceError, RecordError
from spte.record.journal import SUFFIX, finish
from spte.record.recorder import MAX_INTERVAL_S, MIN_INTERVAL_S, Recorded
from spte.record.recorder import record as run_record
from spte.record.session import Progress
from spte.trace import Trace

HELP = """Record which 4 KiB pages a program writes in each epoch, into a trace for `spte profile`.

The kernel tracks the pages (userfaultfd WP_ASYNC, PAGEMAP_SCAN; Linux 6.7, x86-64): every page that is in memory at the
end of its epoch is reported, nothing is sampled. The program is started, or found by its pid; an exec is followed;
children are named and left alone. It ends when the program exits or with Ctrl-C or SIGTERM, and the program runs on; but
a Ctrl-C in a terminal reaches a program started with -- CMD too, and ends it unless it handles SIGINT.

\b
  spte record -o redis.npz -- redis-server --port 7777
  spte record --pid 1234 --interval 50ms
  timeout --preserve-status 30 spte record --pid 1234
  spte record --recover trace.npz.journal

The file appears at the end, whole, and replaces one of that name. Until then a journal lies beside it; if spte record
is killed, --recover makes the trace of what it holds.
"""

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


def interval(text: str) -> float:
    """Return the seconds that `text` spells: a number with us, ms, s or m."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(us|ms|s|m)", text.strip(), re.ASCII)
    value = float(match[1]) * _UNITS[match[2]] if match else 0
    if not MIN_INTERVAL_S <= value <= MAX_INTERVAL_S:
        raise click.BadParameter(
            f"{text[:40]!r}; take a number and a unit, from {MIN_INTERVAL_S * 1000:g}ms to {MAX_INTERVAL_S:g}s, such as 100ms"
        )
    return value


@click.command(
    help=HELP, short_help="Record which pages a program writes.", context_settings={"allow_interspersed_args": False}
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- CMD ARGS...")
@click.option("--pid", type=int, help="Record this process, not a new one.")
@click.option("--interval", type=interval, default="100ms", show_default=True, help="Length of an epoch: 100ms, 1s.")
@click.option("-o", "--output", type=target(), metavar="FILE", help="The trace to write. Default trace.npz.")
@click.option("--recover", type=click.Path(path_type=Path), metavar="JOURNAL", help="Make the trace of an interrupted recording.")
def record(command: tuple[str, ...], pid: int | None, interval: float, output: Path | None, recover: Path | None) -> int:
    """Check what was asked for, record, say what came of it, and return the exit code."""
    if (pid is not None) + bool(command) + (recover is not None) != 1:
        raise click.UsageError("give one of --pid PID, -- CMD ARGS..., or --recover JOURNAL")
    if command and not command[0]:
        raise click.UsageError("the name of the program is empty; give -- CMD ARGS...")
    if pid is not None and pid < 1:
        raise click.UsageError(f"--pid {pid}; take the pid of a process")
    try:
        if recover is not None:
            return _recover(recover, output)
        output = output or target()("trace.npz")
        with _live_line() as on_epoch:
            done = run_record(output, interval, pid=pid or 0, command=command, on_epoch=on_epoch)
    except RecordError as error:
        raise _refusal(error) from None
    return _report(done, output)


def _recover(journal: Path, output: Path | None) -> int:
    if output is None:
        if journal.suffix != SUFFIX:
            raise click.UsageError(f"{str(journal)!r} does not end in {SUFFIX}; name the journal, and the trace with -o")
        output = target()(str(journal.with_suffix("")))
    _say(f"{output}: {_summary(finish(journal, output))}")
    return EXIT_OK


class _Missing(click.UsageError):
    exit_code = EXIT_MISSING


def _refusal(error: Exception) -> click.ClickException:
    return (_Missing if isinstance(error, MissingPieceError) else click.UsageError)(str(error))


def _report(done: Recorded, output: Path) -> int:
    _say(f"{done.ended}")
    if done.children:
        some = ", ".join(f"{pid} {name}" for pid, name in list(done.children.items())[:8])
        more = f" and {len(done.children) - 8} more" if len(done.children) > 8 else ""
        _say(f"children, not recorded: {some}{more}; --pid records one of them")
    for name, why in done.refused.items():
        _say(f"not tracked: {name} ({why})")
    _say(f"{output}: {_summary(done.trace)}")
    if done.trouble:
        raise _refusal(done.trouble)
    return EXIT_OK


def _summary(trace: Trace) -> str:
    return (
        f"{trace.nepochs} epochs, {trace.duration_ns / 1e9:.1f} s, {trace.writes:,} page writes, "
        f"{spell_size(trace.npages * PAGE_SIZE)} of memory"
    )


def _say(line: str) -> None:
    click.echo(f"spte record: {line}", err=True)


@contextmanager
def _live_line() -> Iterator[Callable[[Progress], None] | None]:
    """Yield what shows a recording's progress on stderr, or None when that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True) as live:

        def show(progress: Progress) -> None:
            live.update(Text(live_line(progress), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show


def live_line(progress: Progress) -> str:
    """Return the line that shows a running recording; the costs are shares of the last epoch, of one core."""
    epoch_s = progress.epoch_s or 1.0
    parts = [
        f"{progress.epochs} epochs",
        f"{progress.seconds:.1f} s",
        f"{progress.pages * PAGE_SIZE / 1e6 / epoch_s:.1f} MB/s dirtied",
        f"tracking: scan {progress.scan_s / epoch_s:.1%}, faults about {progress.fault_s / epoch_s:.1%}",
    ]
    if progress.children:
        parts.append("children left alone: " + ", ".join(f"{pid} {name}" for pid, name in progress.children.items()))
    return " | ".join(parts)
