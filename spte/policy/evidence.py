"""What a decision of a version rests on: recordings on both sides, or a commit alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from spte.policy.decisions import decisions, spell
from spte.policy.versions import VERSIONS, as_of, mainline, unknown

HOLDERS = Path(__file__).parent.parent / "data" / "holders.json"
"""For each decision and recorded version: the other values, and a recording that differs under each. `spte.check.holders` makes it."""


class Evidence(NamedTuple):
    """What a decision of a version rests on.

    Parameters
    ----------
    decision, value : str
        Name, and value as the command line spells it.
    since, source : str
        Version from which the decision has that value, and where that is from.
    before, after : str or None
        The nearest versions, not later and not earlier than this one, whose recordings tell this value of the decision from every
        other; both are this one if its own do.
    recordings : tuple of str
        One of each of those, ``archive/scenario``.
    recorded : bool
        Both hold this value; False: it rests on a commit alone, or the version of the last or next change does.
    """

    decision: str
    value: str
    since: str
    source: str
    before: str | None
    after: str | None
    recordings: tuple[str, ...]
    recorded: bool


@cache
def _holders() -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = json.loads(HOLDERS.read_text())
    return found


def evidence(version: str) -> list[Evidence]:
    """Return what each decision of a mainline version rests on, in order; PlatformError (EINVAL) if it has no policy."""
    name = mainline(version)
    if name is None:
        raise unknown("version", version)
    at, rows = VERSIONS.index(name), []
    for f in decisions():
        changes = f.metadata["changes"]
        others = len({change.value for change in changes} if len(changes) > 1 else f.metadata["choices"]) - 1
        now, held = as_of(changes, name), {v: told for v, told in _holders().get(f.name, {}).items() if len(told) == others}
        before = next((v for v in reversed(VERSIONS[: at + 1]) if v in held), None)
        after = next((v for v in VERSIONS[at:] if v in held), None)
        sides = [side for side in dict.fromkeys((before, after)) if side is not None]
        recordings = tuple(next(iter(held[side].values())) for side in sides)
        both = before is not None and after is not None and all(as_of(changes, side) == now for side in sides)
        rows.append(Evidence(f.name, spell(now.value), now.version, now.source, before, after, recordings, both))
    return rows
