"""`spte replay`: what the model does with the ops of one recording."""

from __future__ import annotations

import click

from spte.cli.exit_codes import EXIT_DIFFERENCE, EXIT_OK


@click.command(short_help="Perform a recording of real KVM on the model.")
@click.argument("file", type=click.Path(dir_okay=False, exists=True))
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to this file; .gz and .xz compress.")
@click.option("--events", is_flag=True, help="Add the tracepoints of each op, in their kernel names.")
def replay(file: str, output: str | None, events: bool) -> int:
    """Perform every op of the recording FILE on the model.

    Writes records of the same format, to stdout or with -o to a file that `spte check` takes in its turn. An op that
    the model does not know ends it with exit code 1.
    """
    from spte.recording import file as rec
    from spte.replay.guest import UnsupportedOp
    from spte.replay.run import replay as run

    records = []
    try:
        recording = rec.read(file)
        for record in run(recording, events=events):
            if output is None:
                if not record["i"]:
                    click.echo(rec.dumps(recording.header))
                click.echo(rec.dumps(record))
            records.append(record)
        if output is not None:
            rec.write(output, recording.header, records)
            click.echo(f"{len(records)} ops written to {output}", err=True)
    except UnsupportedOp as error:
        click.echo(f"spte replay: {recording.name}: op {len(records)}: not modelled: {error}", err=True)
        return EXIT_DIFFERENCE
    except rec.RecordingError as error:
        raise click.UsageError(str(error)) from None
    return EXIT_OK
