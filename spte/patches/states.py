"""The series patch by patch: 5.11, and the decision that each of the 14 patches changes on top of those before it."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from spte.policy import Policy


class Patch(NamedTuple):
    """One of the 14 patches: number, title, mainline commit, and the decision it changes, None if none."""

    number: int
    title: str
    commit: str
    decision: str | None = None
    value: Any = None


PATCHES = (
    Patch(1, "TDP MMU: collapsible zap covers ZONE_DEVICE and HugeTLB", "c060c72ffeb4", "collapse_pages", "compound-or-device"),
    Patch(2, "TDP MMU: honour the start level when write-protecting a slot", "dbb6964e4c38", "tdp_start_level", True),
    Patch(3, "helper: maximum mapping level of a gfn in a slot", "1b6d9d9ed571"),
    Patch(4, "rmap callbacks receive the memslot", "0a234f5dd065"),
    Patch(5, "collapsible zap asks for the maximum mapping level", "9eba50f8d7fc", "collapse_precise", True),
    Patch(6, "nVMX: PML is off in hardware while L2 runs", "c3bb9a20834f", "pml_in_l2", False),
    Patch(7, "comment about SPTEs that are only write-protected", "2855f98265dc"),
    Patch(8, "the CPU's dirty log size is a value, not a callback", "6dd03800b1af"),
    Patch(9, "PML's slot logic moves to common x86 code", "a018eba53870", "sync_kicks_without_pml", True),
    Patch(10, "a change of flags only must toggle logging, else WARN", "52f4607940b1"),
    Patch(11, "PML control follows the number of logging slots", "a85863c2ec55", "pml_control", "logging-slots"),
    Patch(12, "no D bits are set when logging ends", "b6e16ae5d99f", "disable_sets_dirty", False),
    Patch(13, "one write-protect routine with a start level", "a1419f8b5bab", "one_write_protect", True),
    Patch(14, "exports dropped", "96ad91ae4eaf"),
)  # fmt: skip


def _states() -> tuple[Policy, ...]:
    states = [Policy.named("5.11")]
    for patch in PATCHES:
        decided = {patch.decision: patch.value} if patch.decision else {}
        applied = f"patches 1-{patch.number}" if states[1:] else "patch 1"
        states.append(dataclasses.replace(states[-1], name=f"5.11 + {applied}", **decided))
    return tuple(states)


STATES = _states()
"""Policies by the number of patches applied: STATES[0] is 5.11, STATES[14] decides what the preset ``series`` does."""


def around(patch: int, **later: Any) -> tuple[Policy, ...]:
    """Return the policies without and with `patch`, earlier ones applied; with `later` a third, which decides that too."""
    without, with_ = STATES[patch - 1], STATES[patch]
    if not later:
        return without, with_
    spelt = ", ".join(f"{name}={value}" for name, value in later.items())
    return without, with_, dataclasses.replace(with_, name=f"{with_.name}, {spelt}", **later)
