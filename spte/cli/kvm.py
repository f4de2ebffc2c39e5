"""`spte check --kvm`: the host's own KVM beside the model, as text or JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import click

from spte.cli.exit_codes import EXIT_BAD_INPUT, EXIT_DIFFERENCE, EXIT_MISSING, EXIT_OK

SCHEMA = 1


def check_kvm(paths: Iterable[str], *, as_json: bool) -> int:
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
            click.echo(f"Linux {host.kernel}; the model: policy {_version(host.kernel)}, {host.config} ({host.why})")
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


def _version(release: str) -> str | None:
    from spte.policy import mainline

    return mainline(release.split("-")[0])


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
