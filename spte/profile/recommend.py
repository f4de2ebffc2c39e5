"""Which column costs the guest least, and which cost, changed by how much, would turn that."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from spte.cost import CostProfile, Costs
from spte.cost.costs import ITEMS
from spte.profile.columns import labels
from spte.profile.estimate import estimate
from spte.profile.report import Row

FARTHEST = 100.0
"""A cost that turns the verdict only if it is more than so many times as high is not named."""
STEPS = 12
"""Halvings that find the turn: to a part in 4096 of the range."""


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

    def __str__(self) -> str:
        return f"{self.name}: {self.stall / 1e6:.3g} ms: " + ", ".join(f"{item} {share:.0%}" for item, share in self.shares)


class Verdict(NamedTuple):
    """The column of least estimated stall.

    Parameters
    ----------
    best, next : str
        That column, and the second; empty if there is none.
    stall, next_stall : float
        Their stalls, ns an epoch, CPU time of all vCPUs.
    turns : tuple of Turn
        What turns the verdict, the smallest change first.
    refused : tuple of str
        Columns that lost pages and are not considered.
    parts : tuple of Part
        What each column's stall is made of, least stall first.
    """

    best: str
    stall: float
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
        told += [f"  {part}" for part in self.parts]
        if self.next:
            if not self.turns:
                told.append(f"  no single cost turns this, from 0 to {FARTHEST:.0f} times its value")
            told += [f"  it would be {turn}" for turn in self.turns]
        return told + [f"  not considered, as it loses pages: {name}" for name in self.refused]

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {**self._asdict(), "turns": [turn._asdict() for turn in self.turns]}


def recommend(rows: Sequence[Row], profile: CostProfile) -> Verdict | None:
    """Return the column of least estimated stall among those that lose no page; None if all do.

    Of columns that stall alike, the one whose VMM needs less time is best.
    """
    names = dict(zip(map(id, rows), (", ".join(label) for label in labels([row.column for row in rows])), strict=True))
    sound = [row for row in rows if not row.lost]
    refused = tuple(names[id(row)] for row in rows if row.lost)
    if not sound:
        return None

    def order(costs: Costs) -> list[tuple[float, float, int]]:
        found = [(each.stall, each.vmm, i) for i, each in enumerate(estimate(row, costs) for row in sound)]
        return sorted(found)

    ranked = order(profile.costs)
    best = ranked[0][2]
    second = ranked[1] if len(ranked) > 1 else None

    def winner(item: str, value: float) -> int:
        return order(dataclasses.replace(profile.costs, **{item: value}))[0][2]

    def part(row: Row, stall: float) -> Part:
        without = {item: estimate(row, dataclasses.replace(profile.costs, **{item: 0.0})).stall for item in ITEMS}
        shares = sorted(((1 - value / stall if stall else 0.0, item) for item, value in without.items()), reverse=True)
        return Part(names[id(row)], stall, tuple((item, share) for share, item in shares if share >= 0.01))

    turns = []
    for item in ITEMS:
        now = getattr(profile.costs, item)
        for limit in (0.0, now * FARTHEST):
            if limit == now or winner(item, limit) == best:
                continue
            keeps, loses = now, limit
            for _ in range(STEPS):
                middle = (keeps + loses) / 2
                keeps, loses = (middle, loses) if winner(item, middle) == best else (keeps, middle)
            low, high = getattr(profile.low, item), getattr(profile.high, item)
            name = names[id(sound[winner(item, loses)])]
            turns.append(Turn(item, now, loses, name, low <= loses <= high, profile.origins[item].guess))
    turns.sort(key=lambda turn: max(turn.then, turn.now) / max(min(turn.then, turn.now), 1e-9))
    name, stall = names[id(sound[best])], ranked[0][0]
    parts = tuple(part(sound[i], stall) for stall, _, i in ranked)
    return Verdict(
        name, stall, names[id(sound[second[2]])] if second else "", second[0] if second else 0.0, tuple(turns), refused, parts
    )
