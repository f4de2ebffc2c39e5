"""`spte calibrate`: a cost profile of this host's KVM."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from spte._files import write_whole
from spte.cli.exit_codes import EXIT_MISSING, EXIT_OK
from spte.cli.params import target

MAX_REPEATS = 1000


@click.command(short_help="Measure what this host's KVM costs.")
@click.option("--output", "-o", "output", type=target(stream=True), help="File to write, TOML. Default: standard output.")
@click.option("--repeats", type=click.IntRange(1, MAX_REPEATS), default=7, show_default=True, help="How often each step is timed.")
def calibrate(output: Path | None, repeats: int) -> int:
    """Measure what this host's KVM costs: exits, write faults, GET, CLEAR, enabling and disabling per page, by a tiny guest on /dev/kvm.

    Writes a cost profile: for each item the median and the band of what was measured, and where the number is from. What no step shows is a
    guess, and says so. On a software backend, with neither VMX nor SVM, every item is marked as a guess. It takes some seconds, root or the
    group of /dev/kvm, and an idle machine. Exit code 4 without a KVM that can be used.
    """
    from spte.calibrate import calibrate as measure
    from spte.cost import dump
    from spte.devkvm import NoKvmError

    def show(repeat: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{repeat} of {repeats} repeats", err=True, nl=repeat + 1 == repeats)

    try:
        profile, host = measure(repeats, show)
    except NoKvmError as error:
        click.echo(f"spte calibrate: {error}", err=True)
        return EXIT_MISSING
    if host.user_mode:
        click.echo(f"spte calibrate: every cost is marked as a guess: {host.why}; no processor's costs are measured here", err=True)
    if output is None:
        click.echo(dump(profile), nl=False)
    else:
        write_whole(output, dump(profile))
        known = len(profile.origins) - len(profile.guesses)
        click.echo(f"{output}: {len(profile.origins)} costs, {known} measured, {len(profile.guesses)} guesses", err=True)
    return EXIT_OK
