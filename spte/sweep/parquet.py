"""The result of a sweep as a Parquet file: a row a point, its settings and its figures; the sweep's digest is in the metadata."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spte._files import replacing
from spte.migrate.settings import DEFAULTS
from spte.sweep.points import Figures, Settings, Sweep, SweepError

DIGEST = b"spte_sweep"


def write(plan: Sweep, figures: Sequence[Figures], path: Path) -> None:
    """Write `figures`, one for each point of `plan`, to `path`: the file is there whole or not at all."""
    rows = [{**DEFAULTS, **point, **found} for point, found in zip(plan.points, figures, strict=True)]
    schema = pa.schema([(name, _kind(name, rows)) for name in rows[0]], metadata={DIGEST: plan.digest.encode()})
    with replacing(path) as stream:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), stream)


def _kind(name: str, rows: Sequence[dict[str, Any]]) -> Any:
    value = next((row[name] for row in rows if row[name] is not None), 0)
    return pa.string() if isinstance(value, str) or name == "cost" else pa.bool_() if isinstance(value, bool) else pa.int64()


def read(plan: Sweep, path: Path) -> list[Figures]:
    """Return the figures of each point of `plan` from `path`.

    Raises
    ------
    SweepError
        If the file is no Parquet file, or holds another sweep.
    """
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SweepError(f"{path} is no Parquet file ({' '.join(str(error).split())[:80]}); name another one, or remove it") from None
    if (table.schema.metadata or {}).get(DIGEST, b"").decode() != plan.digest:
        raise SweepError(f"{path} holds another sweep, or its traces have changed; name another file, or remove it")
    known: Settings = DEFAULTS
    return [{name: value for name, value in row.items() if name not in known} for row in table.to_pylist()]
