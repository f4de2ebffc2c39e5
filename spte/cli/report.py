"""What `spte profile` prints: tables, a line an epoch, the verdict; as text, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spte.cli.metrics import Report, as_json, sections, spell
from spte.cli.params import spell_size
from spte.cli.text import columns, pipes
from spte.platform import PAGE_SIZE
from spte.profile.columns import shared
from spte.profile.epochs import epochs
from spte.profile.recommend import recommend
from spte.profile.report import Row
from spte.profile.workload import Workload

EPOCHS_SCHEMA = "spte-profile-epochs/1"
TIMING = "~ depends on timing: another run with vCPUs on threads counts otherwise; all other counts are exact"


class Wanted(NamedTuple):
    """What is to be printed: style (None: text), epochs in place of the table, the table turned, bands, the verdict."""

    style: str | None
    epochs: bool
    pivot: bool
    band: bool
    recommend: bool


def title(work: Workload, rows: Sequence[Row]) -> str:
    """Return what the workload is, and what all columns have in common."""
    about, common = work.describe(), shared([row.column for row in rows])
    name = about["command"] if about["kind"] == "trace" else "dirty_log_perf_test"
    on = f" on {common['backing']}" if "backing" in common else ""
    log = f", log {common['log']}" if "log" in common else ""
    return f"{name}\n{spell_size(work.npages * PAGE_SIZE)}{on}, {work.nepochs} epochs, {work.vcpus} vCPU{log}"


def render(report: Report, wanted: Wanted, *, color: bool) -> str:
    """Return the text that is to be printed."""
    return _epochs(report, wanted) if wanted.epochs else _table(report, wanted, color=color)


def verdict_of(report: Report) -> list[str]:
    """Return the recommendation in words; the report has costs."""
    assert report.profile
    verdict = recommend(report.rows, report.profile)
    return verdict.lines() if verdict else ["every column loses pages: none is recommended"]


def _epochs(report: Report, wanted: Wanted) -> str:
    lines = list(epochs(report.rows, report.profile, band=wanted.band))
    return {"json": _epochs_json, "csv": _epochs_csv, "markdown": _epochs_markdown, None: _epochs_text}[wanted.style](lines)


def _table(report: Report, wanted: Wanted, *, color: bool) -> str:
    rows, costs = report.rows, report.profile
    if wanted.style == "json":
        verdict = recommend(rows, costs) if costs and wanted.recommend else None
        return _json({**as_json(report), "verdict": verdict and verdict.as_dict()})
    from spte.cli.table import markdown, plain

    figures = sections(rows, costs, band=wanted.band)
    lines = [*report.notes]
    if any(row.threads for row in rows):
        lines.append(TIMING)
    if costs:
        guesses = f"; guesses: {', '.join(costs.guesses)}" if costs.guesses else ""
        lines.append(f"estimated at the costs of {costs.name}: {costs.title}{guesses}")
    if costs and wanted.recommend:
        lines += [""] * bool(lines) + verdict_of(report)
    below = "".join(f"{line}\n" for line in lines)
    if wanted.style == "markdown":
        return markdown(rows, figures, pivot=wanted.pivot) + (f"\n{below}" if below else "")
    return f"{title(report.workload, rows)}\n\n{plain(rows, figures, pivot=wanted.pivot, color=color)}" + (f"\n{below}" if below else "")


def _epochs_json(lines: Sequence[Mapping[str, Any]]) -> str:
    return _json({"schema": EPOCHS_SCHEMA, "epochs": lines})


def _epochs_csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the epochs as CSV: a line of names, then a line an epoch and column; an unknown time is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _epochs_cells(lines: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the head and a row of cells an epoch, without the figures that are 0 in each; estimates say so by their names."""
    names = [name for name in (lines[0] if lines else ()) if any(line[name] not in (0, None) for line in lines) or name == "epoch"]
    return [names, *([_cell(line[name]) for name in names] for line in lines)]


def _epochs_markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{line}\n" for line in pipes(_epochs_cells(lines)))


def _epochs_text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{line}\n" for line in columns(_epochs_cells(lines)))


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else spell(value)


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, allow_nan=False) + "\n"
