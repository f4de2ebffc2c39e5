"""`spte diff`: what changes when one decision, or the platform, changes."""

from __future__ import annotations

import json

import click

from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.params import BYTES_PER_PAGE, announce_compilation, log_mode, refuse_too_large, size
from spte.cli.text import columns, pipes
from spte.diff import Difference
from spte.diff import diff as compare
from spte.platform import PAGE_SIZE
from spte.policy import Policy, parse
from spte.profile.columns import Column, Log
from spte.profile.workload import BACKINGS, TraceWorkload, WorkloadError
from spte.trace import PAGES_PER_2M, TraceError, default_trace, named

SCHEMA = "spte-diff/1"
DEFAULT_PLATFORM, DEFAULT_POLICY = "ept-pml", "6.12"

HELP = """What changes when one decision changes: a workload under POLICY_A and under POLICY_B, only what differs.

The guest populates its memory, logging is enabled, each epoch of the trace is performed and harvested, logging is disabled, and every
page is written once more (retouch). Counts are summed over the epochs, operation by operation; below them stands the first
operation after which the SPTEs differ. TRACE is as for `spte profile`; by default sqlite, of the package. Exit code 1 if
anything differs.

\b
  spte diff 6.12 6.13
  spte diff 6.12 6.12,eager_page_split=N redis.npz --log manual
  spte diff --platform ept-pml ept-nopml redis
  spte diff 6.1 6.12 --platform ept-pml-rmap ept-pml-rmap

With --platform, one policy is taken for both, and 6.12 if none is given.
"""


@click.command(help=HELP, short_help="What changes when one decision, or the platform, changes.")
@click.argument("args", metavar="POLICY_A POLICY_B [TRACE]", nargs=-1)
@click.option("--platform", "platforms", nargs=2, metavar="A B", help=f"Platform of each side. Default: {DEFAULT_PLATFORM} of both.")
@click.option("--log", type=log_mode, default="bitmap", metavar="MODE", help="bitmap, manual, initially-set or ring=64K. Default bitmap.")
@click.option("--backing", type=click.Choice(BACKINGS), default="thp", show_default=True, help="Host memory.")
@click.option("--vcpus", type=int, default=1, show_default=True, help="vCPUs; 2 MiB regions are dealt to them in turn.")
@click.option("--memory", type=size, help="Guest memory in bytes, a multiple of 2M. Default: the trace's.")
@click.option("--json", "style", flag_value="json", help="Print JSON; `schema` names its version.")
@click.option("--markdown", "style", flag_value="markdown", help="Print a Markdown table.")
def diff(
    args: tuple[str, ...], platforms: tuple[str, str] | None, log: Log, backing: str, vcpus: int, memory: int | None, style: str | None
) -> int:
    """Read what is to be compared, compare, print, and return the exit code."""
    policies, path = _told(args, both=platforms is not None)
    if memory is not None and memory % (PAGES_PER_2M * PAGE_SIZE):
        raise click.UsageError(f"--memory {memory} is not a multiple of 2 MiB; round it")
    sides = [Column(name, policy, log, backing) for name, policy in zip(platforms or (DEFAULT_PLATFORM,) * 2, policies, strict=True)]
    for side in sides:
        _ = side.on  # an unknown platform is refused before the trace is read
    try:
        trace = default_trace() if path is None else named(path)
        work = TraceWorkload(trace, memory and memory // PAGE_SIZE, vcpus=vcpus, backing=backing)
    except (TraceError, WorkloadError) as error:
        raise click.UsageError(str(error)) from None
    refuse_too_large(work.npages, BYTES_PER_PAGE)
    announce_compilation()
    found = compare(work, *sides)
    click.echo(_json(found, sides) if style == "json" else _text(found, sides, markdown=style == "markdown"), nl=False)
    return EXIT_DIFFERENCE if found.any else EXIT_OK


def _told(args: tuple[str, ...], *, both: bool) -> tuple[tuple[Policy, Policy], str | None]:
    """Return the two policies and the trace that the arguments name; with --platform there may be fewer than two policies."""
    if not both:
        if not 2 <= len(args) <= 3:
            raise click.UsageError(f"{len(args)} arguments; take two policies and at most one trace, or two platforms by --platform A B")
        return (parse(args[0]), parse(args[1])), args[2] if len(args) == 3 else None
    names = [arg for arg in args[:2] if arg[:1].isdigit() or arg.split(",")[0] == "series"]
    rest = args[len(names) :]
    if len(rest) > 1:
        raise click.UsageError(f"{rest[0]!r} is no policy, and {rest[1]!r} stands behind it; take at most two policies and then one trace")
    chosen = [parse(name) for name in names] or [parse(DEFAULT_POLICY)]
    return (chosen[0], chosen[-1]), rest[0] if rest else None


def _names(sides: list[Column]) -> list[str]:
    """Return what tells the two sides apart: policies, platforms, or both."""
    differing = [key for key in ("platform", "policy") if sides[0].names[key] != sides[1].names[key]] or ["policy"]
    return [" ".join(side.names[key] for key in differing) for side in sides]


def _text(found: Difference, sides: list[Column], *, markdown: bool) -> str:
    names = _names(sides)
    lines = []
    if found.changes:
        rows = [["operation", "count", *names], *([c.operation, c.name, f"{c.a:,}", f"{c.b:,}"] for c in found.changes)]
        lines += [*(pipes(rows, 2) if markdown else columns(rows, 2)), ""]
    else:
        lines.append("no count differs")
    if not found.comparable:
        lines.append(f"SPTEs are not compared: those of {sides[0].platform} and {sides[1].platform} have different layouts")
    elif found.sptes is None:
        lines.append("SPTEs are equal after every operation")
    else:
        first = found.sptes
        epoch = f" of epoch {first.epoch}" if first.epoch else ""
        lines.append(f"SPTEs differ first after {first.operation}{epoch}: {names[0]} has {first.a}, {names[1]} has {first.b}")
    return "".join(f"{line}\n" for line in lines)


def _json(found: Difference, sides: list[Column]) -> str:
    out = {
        "schema": SCHEMA,
        "a": sides[0].names,
        "b": sides[1].names,
        "changes": [change._asdict() for change in found.changes],
        "sptes_compared": found.comparable,
        "first_sptes": found.sptes and found.sptes._asdict(),
    }
    return json.dumps(out, indent=1, allow_nan=False) + "\n"
