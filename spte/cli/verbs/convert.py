"""`spte convert`: a write trace from what other tools record."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click

from spte.cli.exit_codes import EXIT_OK
from spte.cli.params import address, duration, size, spell_size, spell_time, target
from spte.cli.progress import bytes_bar
from spte.convert import FORMATS, Slot
from spte.convert import convert as run_convert
from spte.platform import PAGE_SIZE
from spte.trace import Trace, TraceError, save

HELP = """A write trace (spte-trace/1, a .npz) from what other tools record.

The format is chosen by content; several inputs are one trace. `-` is stdin. Pages may come in any order and often: they
are sorted and kept once an epoch.

\b
  spte convert dirty-*.bin --interval 1s -o vm.npz            a KVM_GET_DIRTY_LOG bitmap each second
  spte convert log.bin --slot 0:3G --slot 4G:5G -o vm.npz     two slots' bitmaps, epoch after epoch
  trace-cmd report | spte convert - -o vm.npz                 also `perf script`, and ftrace's own text
  spte convert lackey.log --interval 1ms -o prog.npz          valgrind --tool=lackey --trace-mem=yes
  spte convert writes.csv --bytes -o prog.npz                 lines of time,address

\b
Formats:
""" + "\n".join(f"  {name:8} {form.about}" for name, form in FORMATS.items())  # fmt: skip


def slot(text: str) -> Slot:
    """Return the memslot that `[ID=]GPA:SIZE` spells."""
    match = re.fullmatch(r"(?:([0-9]{1,10})=)?([^:=]+):([^:=]+)", text.strip())
    if match is None:
        raise click.BadParameter(f"{text[:60]!r} is no slot; take [ID=]GPA:SIZE, like 0:3G or 1=4G:5G")
    return Slot(address(match[2]), size(match[3]), int(match[1]) if match[1] else None)


@click.command(help=HELP, short_help="A write trace from what other tools record.")
@click.argument("inputs", nargs=-1, required=True, metavar="IN...")
@click.option("-o", "--output", type=target(".npz"), required=True, metavar="OUT.npz", help="The trace to write.")
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), help="Do not choose by content.")
@click.option(
    "--interval", type=duration, default="100ms", show_default=True,
    help="Length of an epoch: times are binned into such; a bitmap, ring or snapshot is the epoch of one.",
)  # fmt: skip
@click.option("--pages", "npages", type=int, help="Pages of the guest; bitmaps of so many follow one another in a file.")
@click.option(
    "--slot", "slots", type=slot, multiple=True, metavar="[ID=]GPA:SIZE",
    help="A memslot, in the order of the bitmaps or with KVM's id; repeatable. Holes between slots are left out.",
)  # fmt: skip
@click.option("--bytes", "addresses", is_flag=True, help="Text: the second column is an address in bytes.")
@click.option("--time-unit", type=click.Choice(["s", "ms", "us", "ns"]), help="Text: unit of the first column. Default s.")
@click.option("--squeeze", is_flag=True, help="Leave out the 2 MiB regions that nothing wrote; always so for lackey.")
def convert(inputs: tuple[str, ...], output: Path, kind: str | None, interval: int, **options: Any) -> int:
    """Read the inputs, write the trace, say what it is, and return the exit code."""
    for given in inputs:
        if given != "-" and output.exists() and Path(given).exists() and output.samefile(given):
            raise click.UsageError(f"{given} is both input and output; name another output")
    if inputs.count("-") > 1:
        raise click.UsageError("- is given twice; stdin can be read once")
    if "-" in inputs and sys.stdin is None:
        raise click.UsageError("- is stdin, which is closed; name a file, or pipe the input in")
    try:
        with bytes_bar("reading") as progress:
            trace, found, notes = run_convert(
                [sys.stdin.buffer if given == "-" else given for given in inputs],
                format=kind, interval_ns=interval, progress=progress, **options,
            )  # fmt: skip
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    save(trace, output)
    for note in notes:
        click.echo(f"spte convert: {note}", err=True)
    click.echo(f"{output}: {describe(trace)}, from {FORMATS[found].about}")
    return EXIT_OK


def describe(trace: Trace) -> str:
    """Return a trace's size in a line."""
    each = spell_time(trace.duration_ns / trace.nepochs / 1e9)
    epochs = f"{trace.nepochs} epoch{'s' if trace.nepochs > 1 else ''} of {each}"
    return f"{epochs}, {spell_size(trace.npages * PAGE_SIZE)} of memory, {trace.writes:,} page writes"
