"""What a decision of a version rests on: recordings on both sides, or a commit alone."""

from __future__ import annotations

from typing import NamedTuple

from spte.policy.decisions import decisions, spell
from spte.policy.versions import around, as_of, mainline, unknown


class Evidence(NamedTuple):
    """What a decision of a version rests on.

    Parameters
    ----------
    decision, value : str
        Name, and value as the command line spells it.
    since, source : str
        Version from which the decision has that value, and where that is from.
    before, after : str or None
        The recorded versions next to this one; both are this one if it was recorded.
    recorded : bool
        Recordings on both sides hold the value; False: the version of the last or next change rests on a commit alone.
    """

    decision: str
    value: str
    since: str
    source: str
    before: str | None
    after: str | None
    recorded: bool


def evidence(version: str) -> list[Evidence]:
    """Return what each decision of a mainline version rests on, in order; PlatformError (EINVAL) if it has no policy."""
    name = mainline(version)
    if name is None:
        raise unknown("version", version)
    before, after = around(name)
    rows = []
    for f in decisions():
        now = as_of(f.metadata["changes"], name)
        both = all(side is not None and as_of(f.metadata["changes"], side) == now for side in (before, after))
        rows.append(Evidence(f.name, spell(now.value), now.version, now.source, before, after, both and f.metadata["shown"]))
    return rows
