"""Patterns of page writes: which pages an epoch writes. Each is a dataclass; its fields are the pattern's own parameters."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from spte._arguments import integer, spell
from spte.trace import TraceError

Gfns = npt.NDArray[np.int64]
MAX_STRIDE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Pattern:
    """What `spte.generate.generate` asks of a pattern."""

    ABOUT: ClassVar[str]

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages that epoch `epoch` writes, int64, in any order and as often as they come.

        The epoch's writes are those with the numbers [first, last) since the start; `npages` is the guest's size.
        """
        raise NotImplementedError

    @classmethod
    def name(cls) -> str:
        """Return the name under which `spte generate` knows the pattern, such as ``"hot-cold"``."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()


def number(value: Any, name: str) -> Any:
    """Return a parameter if it is a real number; else TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}={spell(value)} is of type {type(value).__name__}; pass a number")
    return value


def _parameter(default: float, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class Sequential(Pattern):
    """One page after the other, round and round."""

    ABOUT: ClassVar[str] = "one page after the other, round and round"

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        return np.arange(first, min(last, first + npages)) % npages


@dataclasses.dataclass(frozen=True)
class Uniform(Pattern):
    """Each write hits any page of memory with the same chance."""

    ABOUT: ClassVar[str] = "each write hits any page with the same chance"

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        return rng.integers(0, npages, last - first)


@dataclasses.dataclass(frozen=True)
class FixedRate(Pattern):
    """Exactly as many distinct pages in each epoch as the rate says, at random places: all of memory at most."""

    ABOUT: ClassVar[str] = "just as many distinct pages an epoch as the rate says, at random places"

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        return rng.choice(npages, min(last - first, npages), replace=False, shuffle=False)


@dataclasses.dataclass(frozen=True)
class Zipf(Pattern):
    """The page of rank r is written with a chance of 1/r^theta; ranks lie scattered over memory."""

    ABOUT: ClassVar[str] = "the page of rank r is written with chance 1/r^theta; ranks are scattered"

    theta: float = _parameter(0.99, "Skew; the default is YCSB's.")

    def __post_init__(self) -> None:
        if not 0 < number(self.theta, "theta") <= 10:
            raise TraceError(f"theta={spell(self.theta)}; take more than 0 and at most 10")

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        return scattered(zipf_ranks(last - first, npages, self.theta, rng), npages)


@dataclasses.dataclass(frozen=True)
class HotCold(Pattern):
    """A hot share of memory takes most of the writes; both halves are uniform. The hot pages are the first ones."""

    ABOUT: ClassVar[str] = "a hot share of memory, at its beginning, takes most of the writes"

    hot: float = _parameter(0.1, "Share of memory that is hot.")
    hot_writes: float = _parameter(0.9, "Share of the writes that hit it.")

    def __post_init__(self) -> None:
        for name, value in (("hot", self.hot), ("hot_writes", self.hot_writes)):
            if not 0 < number(value, name) < 1:
                raise TraceError(f"{name}={spell(value)}; it is a share, above 0 and below 1")

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        border = min(npages - 1, max(1, round(npages * self.hot)))
        is_hot = rng.random(last - first) < self.hot_writes
        return np.where(is_hot, rng.integers(0, border, last - first), rng.integers(border, npages, last - first))


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """Every `stride`-th page, then those one further, and so on: a column of a matrix after the other."""

    ABOUT: ClassVar[str] = "every n-th page, then those one further: a matrix column by column"

    stride: int = _parameter(16, "Distance of two writes, in pages.")

    def __post_init__(self) -> None:
        integer(self.stride, "stride", TraceError, 1, MAX_STRIDE + 1)

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        stride = min(self.stride, npages)
        rows, longer = divmod(npages, stride)  # the first columns have a page more, if the stride does not divide memory
        nth = np.arange(first, min(last, first + npages)) % npages
        split = longer * (rows + 1)
        column = np.where(nth < split, nth // (rows + 1), longer + (nth - split) // rows)
        page: Gfns = np.where(nth < split, nth % (rows + 1), (nth - split) % rows) * stride + column
        return page


@dataclasses.dataclass(frozen=True)
class AppendLog(Pattern):
    """A log grows from page 1 on and begins anew at its end; page 0, its head, is written in every epoch.

    The page at which one epoch stops is written on by the next.
    """

    ABOUT: ClassVar[str] = "a log that grows and begins anew; its head is written in every epoch"

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        tail = np.arange(max(0, first - 1), min(last, first + npages)) % (npages - 1) + 1
        return np.append(tail, 0)


@dataclasses.dataclass(frozen=True)
class GcSweep(Pattern):
    """Allocation goes through a nursery; the epoch that fills it also sweeps the rest of memory, as a collection does."""

    ABOUT: ClassVar[str] = "allocation in a nursery; each time it is full, one epoch sweeps all the rest"

    nursery: float = _parameter(0.25, "Share of memory that is nursery, at its beginning.")

    def __post_init__(self) -> None:
        if not 0 < number(self.nursery, "nursery") < 1:
            raise TraceError(f"nursery={spell(self.nursery)}; it is a share, above 0 and below 1")

    def pages(self, epoch: int, first: int, last: int, npages: int, rng: np.random.Generator) -> Gfns:
        """Return the pages of an epoch."""
        size = min(npages - 1, max(1, round(npages * self.nursery)))
        young = np.arange(first, min(last, first + size)) % size
        is_full = last // size > first // size
        return np.append(young, np.arange(size, npages)) if is_full else young


PATTERNS: Mapping[str, type[Pattern]] = {
    kind.name(): kind for kind in (Sequential, Uniform, Zipf, HotCold, Strided, AppendLog, GcSweep, FixedRate)
}


def zipf_ranks(count: int, ranks: int, theta: float, rng: np.random.Generator) -> Gfns:
    """Draw `count` ranks from 0 below `ranks`, rank r with a chance proportional to (r + 1)^-theta.

    Rejection-inversion after Hörmann and Derflinger (1996): exact, and no table of the ranks is needed.
    """

    def integral(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        log: npt.NDArray[np.float64] = np.log(x)
        return log if theta == 1 else np.expm1((1 - theta) * log) / (1 - theta)

    def inverse(u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        log = u if theta == 1 else np.log1p(np.maximum(u * (1 - theta), -1 + 2**-53)) / (1 - theta)
        x: npt.NDArray[np.float64] = np.exp(log)
        return x

    low, high = integral(np.array([1.5])) - 1, integral(np.array([ranks + 0.5]))
    found: list[Gfns] = [np.empty(0, np.int64)]
    missing = count
    while missing > 0:
        u = low + (high - low) * rng.random(missing + missing // 8 + 16)
        rank = np.clip(np.rint(inverse(u)), 1, ranks)
        taken = rank[u >= integral(rank + 0.5) - rank**-theta].astype(np.int64) - 1
        found.append(taken[:missing])
        missing -= len(found[-1])
    return np.concatenate(found)


def scattered(rank: Gfns, npages: int) -> Gfns:
    """Return a place of its own for each rank, neighbours far from each other, without a table."""
    factor = round(npages * (math.sqrt(5) - 1) / 2) | 1
    while math.gcd(factor, npages) > 1:
        factor += 2
    return rank * factor % npages
