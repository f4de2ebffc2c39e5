"""Mainline versions of Linux: which have a policy, which were recorded, and where a decision changed."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from spte._arguments import instance, spell
from spte.errors import PlatformError

VERSIONS = (*(f"5.{n}" for n in range(10, 20)), *(f"6.{n}" for n in range(20)), *(f"7.{n}" for n in range(3)))
"""Mainline versions that name a policy, oldest first."""
RECORDED = ("5.10", "6.1", "6.12", "6.18", "7.2")
"""Those of which recordings of real KVM exist (5.10 is the stable kernel 5.10.223)."""
_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.\d+)?")
_RUNNING = re.compile(r"\d{1,4}\.\d{1,4}(?!\d)")


class Change(NamedTuple):
    """A value that a decision has from a version on.

    Parameters
    ----------
    version : str
        Mainline version.
    value : object
        What the kernel does from it on.
    source : str
        A commit, a release, a recording.
    """

    version: str
    value: Any
    source: str


def mainline(name: str) -> str | None:
    """Return the mainline version of a release: 6.8 of ``6.8`` and ``6.8.12``; None if `name` is no release or none that has a policy."""
    match = _RELEASE.fullmatch(instance(name, "version", str, "a name"))
    version = f"{int(match[1])}.{int(match[2])}" if match else None
    return version if version in VERSIONS else None


def running(release: str) -> str | None:
    """Return the mainline version of a kernel by its `release`, as ``uname -r`` prints it: 6.1 of ``6.1.0-44-amd64``; None: no policy."""
    match = _RUNNING.match(instance(release, "release", str, "a name"))
    return mainline(match[0]) if match else None


def unknown(what: str, name: str, *others: str) -> PlatformError:
    """Return the error for a `name` without a policy: says what there is, and which version is the nearest."""
    match = _RELEASE.fullmatch(name)
    near = ""
    if match:
        asked = int(match[1]), int(match[2])
        older = [v for v in VERSIONS if tuple(map(int, v.split("."))) <= asked]
        near = f"the nearest is {older[-1] if older else VERSIONS[0]}; "
    known = ", ".join((*others, f"any mainline version from {VERSIONS[0]} to {VERSIONS[-1]}"))
    return PlatformError(f"{what} {spell(name)} is not known; {near}known are {known}")


def as_of(changes: tuple[Change, ...], version: str) -> Change:
    """Return the change in force at `version`: the last that is not later."""
    at = VERSIONS.index(version)
    return [change for change in changes if VERSIONS.index(change.version) <= at][-1]
