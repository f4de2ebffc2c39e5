"""`spte generate`: write traces by the patterns that people name; each pattern is a command with its own options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from spte.cli.exit_codes import EXIT_OK
from spte.cli.params import duration, rate, size, target
from spte.cli.verbs.convert import describe
from spte.generate import PATTERNS, Pattern, perf_test
from spte.generate import generate as run_generate
from spte.profile.perf_test import PerfTest
from spte.profile.workload import WorkloadError
from spte.trace import Trace, TraceError, save

HELP = """A write trace (spte-trace/1, a .npz) by a known pattern, deterministic by its seed.

What takes a trace takes this one too.

\b
  spte generate zipf --memory 1G --rate 500MB/s -o zipf.npz
  spte generate hot-cold --hot 0.05 --hot-writes 0.99 -o hot.npz
  spte profile zipf.npz --platform ept-pml --platform npt
"""

_output = click.option("-o", "--output", type=target(".npz"), required=True, metavar="OUT.npz", help="The trace to write.")
_memory = click.option("--memory", type=size, default="1G", show_default=True, help="Memory of the guest.")
_interval = click.option("--interval", type=duration, default="100ms", show_default=True, help="Length of an epoch.")
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of all that is random.")
_rate = click.option(
    "--rate", type=rate, default="500MB/s", show_default=True,
    help="Bytes written in a second, 4096 a write; a page that is written twice in an epoch is dirty once.",
)  # fmt: skip
_duration = click.option("--duration", type=duration, default="5s", show_default=True, help="Length of the trace.")


@click.group(help=HELP, short_help="A write trace by a known pattern.", invoke_without_command=True)
@click.pass_context
def generate(ctx: click.Context) -> None:
    """Print the help if no pattern is named."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def _command(name: str, kind: type[Pattern]) -> click.Command:
    fields = dataclasses.fields(kind)

    def run(output: Path, memory: int, rate: int, duration: int, interval: int, seed: int, **parameters: Any) -> int:
        return _write(
            lambda: run_generate(kind(**parameters), memory=memory, rate=rate, duration_ns=duration, interval_ns=interval, seed=seed),
            output,
        )

    for option in (_seed, _interval, _duration, _rate, _memory, _output):
        run = option(run)
    for field in reversed(fields):
        spelled = "--" + field.name.replace("_", "-")
        run = click.option(spelled, field.name, type=type(field.default), default=field.default, show_default=True,
                           help=field.metadata["doc"])(run)  # fmt: skip
    return click.command(name, help=kind.__doc__, short_help=kind.ABOUT)(run)


for _name, _kind in PATTERNS.items():
    generate.add_command(_command(_name, _kind))


@generate.command("perf-test", short_help="what the kernel's dirty_log_perf_test writes, an epoch an iteration")
@_output
@_memory
@_interval
@click.option("--iterations", type=int, default=PerfTest.iterations, show_default=True, help="Iterations, each an epoch.")
@click.option("--write-percent", type=int, default=PerfTest.write_percent, show_default=True, help="Percentage of touches that write.")
@click.option("--random-access", is_flag=True, help="Touch random pages.")
@_seed
def perf_test_command(output: Path, memory: int, interval: int, **options: Any) -> int:
    """Write what the kernel's dirty_log_perf_test writes: an epoch an iteration, in which all memory is touched once."""
    return _write(lambda: perf_test(PerfTest(bytes_per_vcpu=memory, **options), interval_ns=interval), output)


def _write(make: Callable[[], Trace], output: Path) -> int:
    """Make a trace, write it, say what it is, and return the exit code."""
    try:
        trace = make()
    except (TraceError, WorkloadError) as error:
        raise click.UsageError(str(error)) from None
    save(trace, output)
    click.echo(f"{output}: {describe(trace)}")
    return EXIT_OK
