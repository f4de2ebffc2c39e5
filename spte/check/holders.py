"""Which recordings hold which decision: those that differ from the model if it decides otherwise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spte.check.run import check
from spte.policy import HOLDERS, Policy, changes, decisions, running, spell
from spte.recording.file import Recording, RecordingError, read_all
from spte.replay.guest import UnsupportedOp


def with_other_values(version: str, decision: str) -> Iterator[Policy]:
    """Yield the policy of `version` with each other value that `decision` had in some version."""
    policy = Policy.named(version)
    others: dict[Any, None] = dict.fromkeys(change.value for change in changes(decision))
    if set(others) == {getattr(policy, decision)}:
        others = dict.fromkeys(next(f for f in decisions() if f.name == decision).metadata["choices"])
    for value in others:
        if value != getattr(policy, decision):
            yield dataclasses.replace(policy, **{decision: value})


def differs(recording: Recording, policy: Policy) -> bool:
    """Tell whether `recording` differs from the model under `policy`; it must be equal under its own."""
    try:
        return check(recording, policy).finding is not None
    except (RecordingError, UnsupportedOp):
        return True


def holders(archives: Iterable[str | Path]) -> dict[str, dict[str, dict[str, str]]]:
    """Return a recording, ``archive/scenario``, for each decision, recorded version and other value, where one differs.

    Takes half an hour for all recordings there are: most of it for what no recording holds.
    """
    by_version: dict[str, list[Path]] = {}
    for path in sorted(map(Path, archives)):
        version = running(next(read_all(path)).header["kernel"])
        if version is not None:
            by_version.setdefault(version, []).append(path)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for decision in (f.name for f in decisions()):
        for version, paths in by_version.items():
            for policy in with_other_values(version, decision):
                if name := _first_that_differs(paths, policy):
                    other = spell(getattr(policy, decision))
                    found.setdefault(decision, {}).setdefault(version, {})[other] = name
    return found


def _first_that_differs(archives: Iterable[Path], policy: Policy) -> str | None:
    for path in archives:
        for recording in read_all(path):
            if differs(recording, policy) and not differs(recording, Policy.named(policy.name)):
                return f"{path.name.split('.tar')[0]}/{recording.header['scenario']}"
    return None


def write(found: Mapping[str, Any]) -> None:
    """Store what `holders` has found in the package, a line a decision."""
    lines = [f"{json.dumps(decision)}: {json.dumps(versions)}" for decision, versions in found.items()]
    HOLDERS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
