"""`spte show`: what a write trace holds, as text, JSON and picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from spte.cli.exit_codes import EXIT_OK
from spte.cli.params import spell_size, spell_time, target
from spte.platform import PAGE_SIZE
from spte.trace import PAGES_PER_2M, Trace, TraceError, default_trace, named
from spte.trace.summary import WORKING_SET_S, Summary, summarize

HELP = """What a write trace (spte-trace/1, a .npz) holds: how much it dirties, how often the same pages, and where.

TRACE is a file or one of the traces that ship, redis and sqlite; without it, sqlite is shown. A page counts once in each
epoch that wrote it. The table says how many distinct pages an interval of some length dirties: what a round of pre-copy of
that length has to send.

\b
  spte show redis.npz
  spte show redis.npz --png redis.png
"""


@click.command(help=HELP, short_help="What a write trace holds, and its picture.")
@click.argument("trace", required=False, type=click.Path())
@click.option("--png", type=target(".png", ".svg"), metavar="FILE.png", help="Draw it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(trace: str | None, png: Path | None, as_json: bool) -> int:
    """Print the summary, draw the picture, and return the exit code."""
    try:
        loaded = default_trace() if trace is None else named(trace)
    except TraceError as error:
        raise click.UsageError(str(error)) from None
    summary = summarize(loaded)
    if png:
        from spte.cli.plot_trace import draw

        draw(loaded, summary, png)
    if as_json:
        about = {"schema": "spte-show/1", "command": loaded.command, "dirty_bytes_per_s": summary.dirty_rate}
        click.echo(json.dumps({**about, **dataclasses.asdict(summary)}, indent=1, allow_nan=False))
    else:
        click.echo("\n".join(lines(loaded, summary)))
    return EXIT_OK


def lines(trace: Trace, summary: Summary) -> list[str]:
    """Return the summary as lines of text."""
    s = summary
    how = str(trace.meta.get("how", ""))
    mean = s.seconds / s.epochs
    share = s.touched / s.pages
    text = [
        trace.command or "(no command)",
        *([ascii(how)[1:-1][:200]] if how else []),
        "",
        f"memory        {spell_size(s.pages * PAGE_SIZE)}, {s.pages:,} pages",
        f"time          {spell_time(s.seconds)}, {s.epochs} epochs of {spell_time(mean)} in the mean, {s.idle_epochs} of them idle",
        f"page writes   {s.writes:,}, {s.writes / s.epochs:,.0f} an epoch in the mean, at most {s.peak_pages:,} in epoch {s.peak_epoch}",
        f"dirty rate    {s.dirty_rate / 1e6:,.4g} MB/s, {s.writes / s.seconds if s.seconds else 0:,.0f} pages/s",
        f"written       {s.touched:,} pages, {share:.1%} of memory, in {s.regions:,} of {s.pages // PAGES_PER_2M:,} regions of 2 MiB",
        f"working set   {spell_size(s.working_set_pages * PAGE_SIZE)} in the last {spell_time(min(WORKING_SET_S, s.seconds))}, median",
        "",
        f"{'interval':>10} {'dirty pages':>12} {'of memory':>10} {'MB/s':>8}",
    ]
    for interval in s.intervals:
        rate = interval.pages * PAGE_SIZE / interval.seconds / 1e6 if interval.seconds else 0
        text.append(f"{spell_time(interval.seconds):>10} {interval.pages:>12,.0f} {interval.pages / s.pages:>10.2%} {rate:>8,.4g}")
    return text
