"""The 14 patches of the series, each measured: every scenario without and with the one decision, and the series as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spte.patches import logging as patch_logging
from spte.patches import mapping as patch_mapping
from spte.patches.states import PATCHES, Patch
from spte.patches.trial import Outcome, Scenario, perform
from spte.patches.versions import MATRIX, on_trace
from spte.trace import Trace

__all__ = ["Group", "of_patches", "of_versions"]

_SCENARIOS = patch_mapping.SCENARIOS | patch_logging.SCENARIOS


@dataclasses.dataclass(frozen=True)
class Group:
    """What belongs together on the page.

    Parameters
    ----------
    title : str
        A patch's title, or what is compared.
    outcomes : tuple of Outcome
        In order; empty for a patch that changes no behaviour.
    patch : Patch, optional
        The patch; None if the group compares versions.
    """

    title: str
    outcomes: tuple[Outcome, ...]
    patch: Patch | None = None


def of_patches(numbers: Sequence[int] = range(1, len(PATCHES) + 1)) -> list[Group]:
    """Run every scenario of the patches `numbers` (1..14) under the policy without and with that decision.

    Parameters
    ----------
    numbers : sequence of int
        Patches, in the order wanted.

    Returns
    -------
    list of Group
        One a patch.
    """
    return [Group(p.title, _perform(_SCENARIOS.get(p.number, ())), p) for p in (PATCHES[n - 1] for n in numbers)]


def of_versions(trace: Trace) -> list[Group]:
    """Compare versions: what enabling and disabling write, then everything that dirty logging does to the guest of `trace`.

    Parameters
    ----------
    trace : Trace
        Recorded writes.

    Returns
    -------
    list of Group
        The enable/disable matrix, and the trace.
    """
    whole = f"The series as a whole: {trace.command}; {trace.npages >> 8} MiB, {trace.nepochs} epochs"
    return [
        Group("What enabling and disabling do: 5 MiB of THP, 2 huge and 256 small leaves", _perform(MATRIX)),
        Group(whole, _perform(on_trace(trace))),
    ]


def _perform(scenarios: Sequence[Scenario]) -> tuple[Outcome, ...]:
    return tuple(perform(scenario) for scenario in scenarios)
