"""The `spte` command: finds the verb, turns every error into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence

import click

from spte._version import __version__
from spte.cli.exit_codes import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_MISSING, EXIT_OK

# A verb is the command of that name in the module of that name in `verbs`; modules are imported when their verb is called, so that
# --help costs no more than this file.
VERBS = {
    "calibrate": "Measure what this host's KVM costs.",
    "check": "Compare recordings of real KVM with the model.",
    "convert": "A write trace from what other tools record.",
    "diff": "What changes when one decision, or the platform, changes.",
    "generate": "A write trace by a known pattern: zipf, hot-cold, append-log, ...",
    "migrate": "Will live migration converge: rounds, total time, downtime.",
    "papers": "Published experiments, run again: published against estimated.",
    "patches": "Each of the 14 patches of the series, before and after.",
    "policies": "List every decision of every kernel version, with its source.",
    "profile": "What dirty logging costs for a program's recorded writes.",
    "record": "Record which pages a program writes.",
    "replay": "Perform a recording of real KVM on the model.",
    "show": "What a write trace holds, and its picture.",
    "sweep": "Many migrations: all combinations of options, on all cores or a cluster.",
}


EXTRAS = {"matplotlib": "cli", "rich": "cli", "distributed": "cluster", "pyarrow": "data", "plotly": "report"}
"""Optional packages, and the extra that brings each."""


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = getattr(importlib.import_module(f"spte.cli.verbs.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="spte")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """KVM's x86 dirty logging as arrays: what it costs, and whether every write is reported.

    Exit codes: 0 fine; 1 a difference or a loss was found; 2 bad input; 4 this host lacks a piece, such as an optional
    dependency.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(argv: Sequence[str]) -> int:
    """Run the command line `argv`, without the program's name; return the exit code. Errors go to stderr, one line."""
    if sys.stderr is None:  # closed: nobody reads it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
    if sys.stdout is None:
        return _fail("spte: standard output is closed; give it a place, such as >/dev/null", EXIT_BAD_INPUT)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows question marks, not a traceback
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`spte profile | head`): nothing is wrong, and the flush at exit must not say so again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        # Not cli.main(), which answers a reader that has gone with exit code 1, the code of a difference.
        with cli.make_context("spte", list(argv)) as ctx:
            result = cli.invoke(ctx)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "spte"
        return _fail(f"{path}: {error.format_message()}", error.exit_code)
    except click.ClickException as error:
        return _fail(f"spte: {error.format_message()}", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail("spte: interrupted", EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(f"spte: this needs {error.name}; pip install 'kvm-spte[{EXTRAS[error.name]}]'", EXIT_MISSING)
    except MemoryError:
        return _fail("spte: this host has not enough memory for this; take a smaller guest", EXIT_MISSING)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        return _fail(f"spte: {error}", EXIT_BAD_INPUT)
    return result if isinstance(result, int) else EXIT_OK


def _fail(message: str, code: int) -> int:
    click.echo(" ".join(message.split()), err=True)
    return code
