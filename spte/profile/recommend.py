"""Which column costs the guest least, and which cost, changed by how much, would turn that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spte.cost import CostProfile, Costs
from spte.cost.costs import ITEMS
from spte.profile.columns import labels
from spte.profile.estimate import estimate
from spte.profile.report import Row

FARTHEST = 100.0
"""A cost that turns the verdict only if it is more than so many times as high is not named."""
STEPS = 24
"""Halvings that find the turn, in a range of up to `FARTHEST` times the cost: to better than a part in 100,000 of the cost."""
ALIKE = 0.01
"""Columns whose stall is within this part of the best are as good."""
TOLD = 8
"""Columns whose parts are told in words."""


class Turn(NamedTuple):
    """One cost that turns the verdict.

    Parameters
    ----------
    item : str
        The cost.
    now, then : float
        Its value, and the nearest at which another column is best, ns.
    best : str
        That column.
    in_band : bool
        The profile holds `then` for possible.
    guess : bool
        The cost is a guess.
    """

    item: str
    now: float
    then: float
    best: str
    in_band: bool
    guess: bool

    def __str__(self) -> str:
        way = "above" if self.then > self.now else "below"
        doubt = "within its band" if self.in_band else "outside its band"
        return f"{self.best} if {self.item} is {way} {self.then:.3g} ns (now {self.now:.3g}{', a guess' * self.guess}; {doubt})"


class Part(NamedTuple):
    """What the stall of a column is made of.

    Parameters
    ----------
    name : str
        The column.
    stall : float
        Its stall, ns an epoch.
    shares : tuple of (str, float)
        Costs, and how much less the stall were without each, as a part of it; the largest first, those below 1 % left out.
    """

    name: str
    stall: float
    shares: tuple[tuple[str, float], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"name": self.name, "stall": self.stall, "shares": dict(self.shares)}

    def __str__(self) -> str:
        return f"{self.name}: {self.stall / 1e6:.3g} ms: " + ", ".join(f"{item} {share:.0%}" for item, share in self.shares)


class Verdict(NamedTuple):
    """The column of least estimated stall.

    Parameters
    ----------
    best : str
        That column.
    stall : float
        Its stall, ns an epoch, CPU time of all vCPUs.
    alike : tuple of str
        Columns within `ALIKE` of it.
    next : str
        The best of all others; empty if there is none.
    next_stall : float
        Its stall.
    turns : tuple of Turn
        What turns the verdict, the smallest change first.
    refused : tuple of str
        Columns that lost pages and are not considered.
    parts : tuple of Part
        What each column's stall is made of, least stall first.
    """

    best: str
    stall: float
    alike: tuple[str, ...]
    next: str
    next_stall: float
    turns: tuple[Turn, ...]
    refused: tuple[str, ...]
    parts: tuple[Part, ...]

    def lines(self) -> list[str]:
        """Return the verdict in words, a line each thing."""
        told = [f"recommended (estimated): {self.best}, {self.stall / 1e6:.3g} ms of guest stall an epoch"]
        if self.next:
            factor = f", {self.next_stall / self.stall:.3g} times as much" if self.stall else ""
            told[0] += f"; next is {self.next} with {self.next_stall / 1e6:.3g} ms{factor}"
        if self.alike:
            told.append(f"  as good, within {ALIKE:.0%}: {'; '.join(self.alike)}")
        told += [f"  {part}" for part in self.parts[:TOLD]]
        if len(self.parts) > TOLD:
            told.append(f"  and {len(self.parts) - TOLD} more, up to {self.parts[-1].stall / 1e6:.3g} ms")
        if self.next and not self.turns:
            told.append(f"  no single cost turns this, from 0 to {FARTHEST:.0f} times its value")
        told += [f"  it would be {turn}" for turn in self.turns]
        return told + [f"  not considered, as it loses pages: {name}" for name in self.refused]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**self._asdict(), "turns": [turn._asdict() for turn in self.turns], "parts": [part.as_dict() for part in self.parts]}


class _Column:
    """A row's stall and VMM time at any costs: linear in them, so 20 estimates serve for all, unless the lock is exclusive."""

    def __init__(self, row: Row, name: str) -> None:
        self.row, self.name = row, name
        self.units = np.array([self._estimate(each) for each in _UNITS]) if row.column.on.tdp_mmu else None

    def _estimate(self, costs: Costs) -> tuple[float, float]:
        found = estimate(self.row, costs)
        return found.stall, found.vmm

    def at(self, costs: Costs) -> tuple[float, float]:
        """Return stall and VMM time, ns."""
        if self.units is None:
            return self._estimate(costs)
        stall, vmm = np.array([getattr(costs, item) for item in ITEMS]) @ self.units
        return float(stall), float(vmm)

    def part(self, costs: Costs) -> Part:
        """Return what its stall is made of."""
        stall = self.at(costs)[0]
        without = {item: self.at(dataclasses.replace(costs, **{item: 0.0}))[0] for item in ITEMS}
        shares = sorted(((1 - value / stall if stall else 0.0, item) for item, value in without.items()), reverse=True)
        return Part(self.name, stall, tuple((item, share) for share, item in shares if share >= 0.01))


_UNITS = [Costs.only(**{item: 1.0}) for item in ITEMS]


def recommend(rows: Sequence[Row], profile: CostProfile) -> Verdict | None:
    """Return the column of least estimated stall among those that lose no page; None if all do.

    Of columns that stall alike to the last digit, the one whose VMM needs less time is best.
    """
    names = [", ".join(label) for label in labels([row.column for row in rows])]
    sound = [_Column(row, name) for row, name in zip(rows, names, strict=True) if not row.lost]
    refused = tuple(name for row, name in zip(rows, names, strict=True) if row.lost)
    if not sound:
        return None
    ranked = sorted(sound, key=lambda column: column.at(profile.costs))
    parts = tuple(column.part(profile.costs) for column in ranked)
    limit = parts[0].stall * (1 + ALIKE)
    alike = tuple(part.name for part in parts[1:] if part.stall <= limit)
    others = parts[1 + len(alike) :]
    rest = (others[0].name, others[0].stall) if others else ("", 0.0)
    turns = tuple(_turns(sound, profile, {parts[0].name, *alike})) if others else ()
    return Verdict(parts[0].name, parts[0].stall, alike, *rest, turns, refused, parts)


def _turns(columns: Sequence[_Column], profile: CostProfile, best: set[str]) -> list[Turn]:
    """Return the single costs at which no column of `best` is best, the smallest change first."""

    def winner(item: str, value: float) -> str:
        costs = dataclasses.replace(profile.costs, **{item: value})
        return min(columns, key=lambda column: column.at(costs)).name

    turns = []
    for item in ITEMS:
        now = getattr(profile.costs, item)
        for limit in (0.0, now * FARTHEST):
            if limit == now or winner(item, limit) in best:
                continue
            keeps, loses = now, limit
            for _ in range(STEPS):
                middle = (keeps + loses) / 2
                keeps, loses = (middle, loses) if winner(item, middle) in best else (keeps, middle)
            low, high = getattr(profile.low, item), getattr(profile.high, item)
            turns.append(Turn(item, now, loses, winner(item, loses), low <= loses <= high, profile.origins[item].guess))
    return sorted(turns, key=lambda turn: max(turn.then, turn.now) / max(min(turn.then, turn.now), 1e-9))
