"""Finding and parsing inside a block of text, all lines at once: NumPy passes instead of a loop over lines."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spte.convert.source import Bytes, Positions

Uint64Array = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

_ZERO, _DOT, _X = 48, 46, 120
_BAD = 255
_NIBBLE = np.full(256, _BAD, np.uint8)
_NIBBLE[48:58] = np.arange(10)
_NIBBLE[97:103] = np.arange(10, 16)
_NIBBLE[65:71] = np.arange(10, 16)
MAX_DECIMALS = 18
"""Digits of the longest decimal number: every one fits into int64."""
MAX_NIBBLES = 16
WINDOW = 4
"""Bytes of the shortest literal that `find` finds."""
_POWERS = 10 ** np.arange(MAX_DECIMALS + 1, dtype=np.uint64)
NS_DIGITS = 9


class Numbers(NamedTuple):
    """`value` uint64 [n], and `ok` bool [n]: whether there was a number; where not, `value` means nothing."""

    value: Uint64Array
    ok: Mask


def find(data: Bytes, literal: bytes) -> Positions:
    """Return every place where `literal`, of WINDOW bytes or more, begins in a block's `data`, ascending."""
    # Passes over bytes, which NumPy does 16 or more at a time, for the last characters, which are rarer than the first ones;
    # the others are compared where those are. bytes.find in a loop takes ten times as long, bytes.split six times.
    before = len(literal) - WINDOW
    size = max(0, len(data) - len(literal) + 1)
    here = np.ones(size, np.bool_)
    for at in range(before, len(literal)):
        here &= data[at : at + size] == literal[at]
    found = np.flatnonzero(here)
    for at in range(before):
        found = found[data[found + at] == literal[at]]
    return found


def next_in_line(places: Positions, after: Positions, line_end: Positions) -> tuple[Positions, Mask]:
    """Return the first of `places` (ascending) at or behind each `after`, and whether that is before `line_end`."""
    if not len(places):
        return np.zeros(len(after), np.int64), np.zeros(len(after), np.bool_)
    at = places[np.minimum(np.searchsorted(places, after), len(places) - 1)]
    return at, (at >= after) & (at < line_end)


def decimal(data: Bytes, start: Positions, end: Positions) -> Numbers:
    """Parse digits that fill [start, end)."""
    length = end - start
    ok = (length > 0) & (length <= MAX_DECIMALS)
    value = np.zeros(len(start), np.uint64)
    for column in range(int(min(length.max(initial=0), MAX_DECIMALS))):
        inside = column < length
        digit = data[np.where(inside, end - 1 - column, 0)] - np.uint8(_ZERO)
        ok &= (digit < 10) | ~inside
        value += np.where(inside & (digit < 10), digit, 0).astype(np.uint64) * _POWERS[column]
    return Numbers(value, ok)


def hexadecimal(data: Bytes, start: Positions, end: Positions) -> Numbers:
    """Parse hexadecimal digits that fill [start, end), with or without 0x before them."""
    start = np.where(_has_0x(data, start, end), start + 2, start)
    length = end - start
    ok = (length > 0) & (length <= MAX_NIBBLES)
    value = np.zeros(len(start), np.uint64)
    for column in range(int(min(length.max(initial=0), MAX_NIBBLES))):
        inside = column < length
        nibble = _NIBBLE[data[np.where(inside, end - 1 - column, 0)]]
        ok &= (nibble != _BAD) | ~inside
        value |= np.where(inside & (nibble != _BAD), nibble, 0).astype(np.uint64) << np.uint64(4 * column)
    return Numbers(value, ok)


def number(data: Bytes, start: Positions, end: Positions) -> Numbers:
    """Parse digits, or 0x and hexadecimal digits, that fill [start, end)."""
    is_hex = _has_0x(data, start, end)
    tens, sixteens = decimal(data, start, end), hexadecimal(data, start, end)
    return Numbers(np.where(is_hex, sixteens.value, tens.value), np.where(is_hex, sixteens.ok, tens.ok))


def fixed_point(data: Bytes, start: Positions, end: Positions, digits: int = NS_DIGITS) -> tuple[Numbers, Mask]:
    """Parse ``123`` or ``123.456`` that fill [start, end), times 10^digits, cut off; and whether there is a point."""
    dots = np.flatnonzero(data == _DOT)
    dot, has_dot = next_in_line(dots, start, end)
    whole_end = np.where(has_dot, dot, end)
    whole = decimal(data, start, whole_end)
    places = np.where(has_dot, end - dot - 1, 0)
    part = decimal(data, np.where(has_dot, dot + 1, end), end)
    up = _POWERS[np.clip(digits - places, 0, MAX_DECIMALS)]
    down = _POWERS[np.clip(places - digits, 0, MAX_DECIMALS)]
    limit = np.uint64(1 << 62) // _POWERS[digits]
    ok = whole.ok & (part.ok | ~has_dot) & (whole.value < limit)
    value = np.where(ok, whole.value, 0).astype(np.uint64) * _POWERS[digits]
    return Numbers(value + np.where(has_dot & ok, part.value * up // down, 0).astype(np.uint64), ok), has_dot


def skip_back(data: Bytes, place: Positions, characters: bytes, most: int) -> Positions:
    """Return for each `place` the end of what is left when up to `most` of `characters` before it are skipped."""
    among = np.zeros(256, np.bool_)
    among[list(characters)] = True
    place = place.copy()
    for _ in range(most):
        step = among[data[np.maximum(place - 1, 0)]] & (place > 0)
        if not step.any():
            break
        place -= step
    return place


def skip(data: Bytes, place: Positions, characters: bytes, most: int) -> Positions:
    """Return for each `place` where what is left begins when up to `most` of `characters` from it on are skipped."""
    among = np.zeros(256, np.bool_)
    among[list(characters)] = True
    place = place.copy()
    for _ in range(most):
        step = among[data[place]]
        if not step.any():
            break
        place += step
    return place


def _has_0x(data: Bytes, start: Positions, end: Positions) -> Mask:
    last = len(data) - 1
    long: Mask = end - start > 2
    both: Mask = long & (data[np.minimum(start, last)] == _ZERO) & (data[np.minimum(start + 1, last)] | 32 == _X)
    return both
