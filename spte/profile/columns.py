"""What stands side by side in a profile: one platform under one policy, with one way to log and one kind of host memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spte._arguments import spell
from spte.platform import Platform, named
from spte.policy import Policy
from spte.profile.workload import MANUALS, WorkloadError, check_choice

INITIALLY_SET = 3
"""KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET."""
_MANUAL = {0: "", 1: "manual", INITIALLY_SET: "initially-set"}
LOG_FROM = ("populated", "creation")
"""When logging begins: once the guest has written every page, or with the slot itself, as for snapshots of a guest from its boot on."""


@dataclasses.dataclass(frozen=True, slots=True)
class Log:
    """A way to log: which pages are armed when, and where userspace finds them.

    Parameters
    ----------
    manual : int
        Manual dirty-log protection: 0; 1 ENABLE: GET, then CLEAR arms; 3 with INITIALLY_SET: enabling arms nothing.
    ring_bytes : int
        Dirty ring of each vCPU, bytes; 0: a bitmap a slot. The VM checks it.

    Raises
    ------
    WorkloadError
        If `manual` is none of these.
    """

    manual: int = 0
    ring_bytes: int = 0

    def __post_init__(self) -> None:
        check_choice("manual", self.manual, MANUALS)

    @property
    def name(self) -> str:
        """``bitmap``, ``manual``, ``initially-set``, or ``ring=64K`` and what is on beside it."""
        if not self.ring_bytes:
            return _MANUAL[self.manual] or "bitmap"
        size = f"{self.ring_bytes >> 10}K" if self.ring_bytes % 1024 == 0 else str(self.ring_bytes)
        return ",".join(filter(None, (f"ring={size}", _MANUAL[self.manual])))

    @property
    def harvest(self) -> tuple[str, ...]:
        """Kinds of the phases that make a harvest."""
        return ("collect", "reset") if self.ring_bytes else ("get", "clear") if self.manual else ("get",)

    @property
    def reports_all_once(self) -> bool:
        """Whether the first harvest reports every page, written or not."""
        return self.manual == INITIALLY_SET and not self.ring_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column of a profile.

    Parameters
    ----------
    platform : str
        Name of the platform.
    policy : Policy
        What the kernel does.
    log : Log
        How it logs.
    backing : str
        Kind of host memory, as `spte.Backing` takes it.
    """

    platform: str
    policy: Policy
    log: Log
    backing: str

    @property
    def names(self) -> dict[str, str]:
        """The column's coordinates by what they are."""
        return {"platform": self.platform, "log": self.log.name, "backing": self.backing, "policy": self.policy.name}

    @property
    def on(self) -> Platform:
        """The platform itself."""
        return named(self.platform)


def labels(columns: Sequence[Column]) -> list[tuple[str, ...]]:
    """Return of each column the coordinates in which `columns` differ; the platform, if in none."""
    differing = [key for key in columns[0].names if len({column.names[key] for column in columns}) > 1] or ["platform"]
    return [tuple(column.names[key] for key in differing) for column in columns]


def shared(columns: Sequence[Column]) -> dict[str, str]:
    """Return the coordinates that all `columns` have in common, by what they are."""
    first = columns[0].names
    return {key: value for key, value in first.items() if all(column.names[key] == value for column in columns)}


def check_chunk(pages: int) -> None:
    """Raise WorkloadError if one CLEAR can not be of `pages` pages."""
    if not 64 <= pages < 1 << 32 or pages % 64:
        raise WorkloadError(f"clear_chunk={spell(pages)} is not a positive multiple of 64 below 2^32, as KVM_CLEAR_DIRTY_LOG takes it")
