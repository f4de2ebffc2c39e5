"""`spte replay`: what the model does with the ops of one recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK
from spte.cli.params import target
from spte.policy import Policy, parse


@click.command(short_help="Perform a recording of real KVM on the model.")
@click.argument("file", type=click.Path(dir_okay=False, exists=True))
@click.option("-o", "--output", type=target(stream=True), help="Write to this file; .gz and .xz compress.")
@click.option("--policy", metavar="NAME[,FIELD=VALUE]...", help="Another kernel in place of the recorded one: what would it do?")
@click.option("--events", is_flag=True, help="Add the tracepoints of each op, in their kernel names.")
def replay(file: str, output: Path | None, policy: str | None, events: bool) -> int:
    """Perform every op of the recording FILE on the model.

    Writes records of the same format, to stdout or with -o to a file that `spte check` takes in its turn. An op that
    the model does not know ends it with exit code 1. With --policy the ops are those of the recorded kernel, and what is done is another's;
    the recorded module parameters hold unless the policy replaces them.
    """
    from spte.recording import file as rec
    from spte.replay.guest import UnsupportedOp
    from spte.replay.run import replay as run

    records = []
    chosen = parse(policy) if policy else None
    try:
        recording = rec.read(file)
        header = _header(recording.header, chosen)
        for record in run(recording, events=events, policy=chosen):
            if output is None:
                if not record["i"]:
                    click.echo(rec.dumps(header))
                click.echo(rec.dumps(record))
            records.append(record)
        if output is not None:
            rec.write(output, header, records)
            click.echo(f"{len(records)} ops written to {output}", err=True)
    except UnsupportedOp as error:
        click.echo(f"spte replay: {recording.name}: op {len(records)}: not modelled: {error}", err=True)
        return EXIT_DIFFERENCE
    except rec.RecordingError as error:
        raise click.UsageError(str(error)) from None
    return EXIT_OK


def _header(header: dict[str, Any], policy: Policy | None) -> dict[str, Any]:
    """Return the header of what is written: with another policy, its kernel, and the policy itself."""
    return header if policy is None else {**header, "kernel": policy.name.split(",")[0], "policy": policy.name}
