"""`spte check`: the model against recordings of real KVM, or against the host's own."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import click

from spte.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DIFFERENCE, EXIT_MISSING, EXIT_OK
from spte.cli.text import pipes

SCHEMA = 1


@click.command(short_help="Compare recordings of real KVM with the model.")
@click.argument("paths", metavar="FILE_OR_DIR...", nargs=-1, type=click.Path())
@click.option("--kvm", is_flag=True, help="Perform the ops on this host's /dev/kvm too, and compare its answers with the model's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema version inside, in place of text.")
@click.option("--markdown", is_flag=True, help="A table of machines and kernels before the totals, as the README has it.")
@click.option("--policy", metavar="NAME[,FIELD=VALUE]...", help="Another kernel in place of each recorded one: where would it differ?")
def check(paths: tuple[str, ...], kvm: bool, as_json: bool, markdown: bool, policy: str | None) -> int:
    """Replay recordings of real KVM and compare the model with them after every op.

    Takes recordings (.jsonl, also .gz and .xz), archives of them (.tar, .tar.gz, .tar.xz), and directories of both.
    Prints the first difference of each recording that has one, then the totals. Exit code 1 on any difference or if
    nothing was compared, 2 if a file is not a recording. With --policy the model is of that kernel, whatever was recorded; the recorded
    module parameters hold unless the policy replaces them.

    With --kvm it is not what was recorded that counts: the ops are performed on this host's KVM and on the model of it, and return codes,
    errno, exits, dirty bitmaps and ring entries are compared. Without a file: the interface scenarios that ship. It writes no
    module parameter, and takes root or the group of /dev/kvm. Exit code 4 without /dev/kvm, or if nothing could be compared.
    """
    from spte.check import run as model
    from spte.policy import parse
    from spte.recording import file as rec

    for given, option in ((markdown, "--markdown"), (policy, "--policy")):
        if kvm and given:
            raise click.UsageError(f"--kvm and {option} exclude each other; take one")
    if kvm:
        return _check_kvm(paths, as_json=as_json)
    if not paths:
        raise click.UsageError("Missing argument 'FILE_OR_DIR...'; or take --kvm, this host's own KVM.")
    if as_json and markdown:
        raise click.UsageError("--json and --markdown exclude each other; take one")
    chosen = parse(policy) if policy else None
    reports: list[model.Report] = []
    bad: list[str] = []
    try:
        found = rec.find(paths)
    except rec.RecordingError as error:
        raise click.UsageError(str(error)) from None
    for path in found:
        try:
            for report in model.check_all(rec.read_all(path), chosen):
                reports.append(report)
                if report.finding is not None and not as_json:
                    click.echo(f"{report.name}: {_line(str(report.finding))}")
        except rec.RecordingError as error:
            bad.append(str(error))
            click.echo(f"spte check: {error}", err=True)
        if sys.stderr.isatty():
            click.echo(f"\r{len(reports)} recordings checked", err=True, nl=False)
    if sys.stderr.isatty():
        click.echo("", err=True)
    sums = model.totals(reports)
    if as_json:
        out = {
            "schema": SCHEMA,
            "passed": sums.passed and not bad,
            "files": sums.files,
            "ops": sums.ops,
            "fields": sums.fields,
            "differing": sums.differing,
            "passing": sums.files - sums.differing,
            "not_recordings": bad,
            "recordings": [report.as_dict() for report in reports],
        }
        click.echo(json.dumps(out))
    else:
        if markdown and reports:
            click.echo("\n".join(pipes(model.matrix(reports), 1)) + "\n")
        passed = sums.files - sums.differing
        click.echo(f"{passed} of {sums.files} recordings pass: {sums.ops} ops, {sums.fields} fields compared; {sums.differing} differ")
        if not sums.files and not bad:
            click.echo("spte check: no recording found; name a file, an archive or a directory", err=True)
    if bad:
        return EXIT_BAD_INPUT
    return EXIT_OK if sums.passed else EXIT_DIFFERENCE


def _check_kvm(paths: Iterable[str], *, as_json: bool) -> int:
    """Perform the recordings of `paths`, or those that ship, on /dev/kvm and on the model; returns the exit code."""
    from spte import devkvm
    from spte.devkvm.device import open_kvm
    from spte.recording import file as rec

    try:
        found = rec.find(paths)
    except rec.RecordingError as error:
        raise click.UsageError(str(error)) from None
    try:
        kvm = open_kvm()
    except devkvm.NoKvmError as error:
        return _missing(str(error))
    reports: list[devkvm.Report] = []
    bad: list[str] = []
    try:
        host = devkvm.host()
        if not as_json:
            click.echo(f"Linux {host.kernel}; the model: policy {host.version}, {host.config} ({host.why})")
        shipped: list[Any] = [None]
        for path in found or shipped:
            try:
                for recording in devkvm.interface() if path is None else rec.read_all(path):
                    reports.append(devkvm.compare(recording, host, kvm))
                    if not as_json:
                        _show(reports[-1])
            except rec.RecordingError as error:
                bad.append(str(error))
                click.echo(f"spte check: {error}", err=True)
    except devkvm.NoKvmError as error:
        return _missing(str(error))
    finally:
        os.close(kvm)
    differ, ended = sum(r.finding is not None for r in reports), sum(r.ended is not None for r in reports)
    sums: dict[str, Any] = {
        "files": len(reports), "ops": sum(r.ops for r in reports), "fields": sum(r.fields for r in reports), "differing": differ,
        "ended": ended, "passing": len(reports) - differ - ended, "skipped": sum(len(r.skipped) for r in reports),
    }  # fmt: skip
    if as_json:
        told = {"kernel": host.kernel, "config": host.config, "why": host.why}
        click.echo(json.dumps({"schema": SCHEMA, **told, **sums, "not_recordings": bad, "recordings": [r.as_dict() for r in reports]}))
    else:
        _totals(reports, sums)
    if bad:
        return EXIT_BAD_INPUT
    if differ:
        return EXIT_DIFFERENCE
    return EXIT_OK if sums["fields"] else _missing("nothing could be compared: this host performs none of the ops")


def _missing(why: str) -> int:
    click.echo(f"spte check: {why}", err=True)
    return EXIT_MISSING


def _show(report: Any) -> None:
    """Print what one recording has come to, if it is not equal from end to end."""
    if report.finding is not None:
        where = f"op {report.finding.i} {report.finding.op}: {report.finding.key}"
        click.echo(_line(f"{report.name}: {where}: the kernel {report.finding.expected}, the model {report.finding.got}"))
    if report.ended is not None:
        click.echo(_line(f"{report.name}: not performed from {report.ended}"))


def _totals(reports: Iterable[Any], sums: dict[str, Any]) -> None:
    reasons = Counter(text.split(": ", 1)[1] for report in reports for text in report.skipped)
    for reason, count in reasons.items():
        click.echo(f"{count} ops not performed: {reason}")
    click.echo(
        f"{sums['passing']} of {sums['files']} recordings are equal: {sums['ops']} ops, {sums['fields']} values compared; "
        f"{sums['differing']} differ, {sums['ended']} not performed to the end"
    )


def _line(text: str, limit: int = 500) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
