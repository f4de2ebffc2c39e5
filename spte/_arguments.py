"""Checks of single arguments, before anything else happens.

The rule of every public call: an argument of a wrong type is a TypeError, a value out of range an error of the package with the errno
of the ioctl. Either is one line that holds the value and the way out, and nothing was changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from spte.errors import ArgumentError

T = TypeVar("T")
LEAST, END = -(1 << 63), 1 << 64  # what 64 bits hold, signed or not
_LONGEST = 80


def spell(value: object) -> str:
    """Return `value` as messages show it: on one line, a long one cut off, a large integer by its size."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a foreign object's own, or Python's for integers of too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def index(value: Any, name: str) -> int:
    """Return `value` as an int if it is an integer, NumPy's too; else TypeError."""
    try:
        return operator.index(value)
    except Exception:  # TypeError, or a foreign object's own
        raise TypeError(f"{name}={spell(value)} is of type {type(value).__name__}; pass an integer") from None


def integer(value: Any, name: str, error: type[Exception] = ArgumentError, least: int = LEAST, end: int = END) -> int:
    """Return `value` as an int from `least` to below `end`; else TypeError, or `error`. By default it is to fit 64 bits."""
    number = index(value, name)
    if not least <= number < end:
        if (least, end) == (LEAST, END):
            raise error(f"{name}={spell(number)} does not fit 64 bits; no call of KVM takes it")
        raise error(f"{name}={spell(number)} is not in {least}..{end - 1}")
    return number


def instance(value: Any, name: str, kind: Callable[..., T], what: str) -> T:
    """Return `value` if it is of `kind`, a class; else TypeError says to pass `what`."""
    if not isinstance(value, cast(type, kind)):
        raise TypeError(f"{name}={spell(value)} is of type {type(value).__name__}; pass {what}")
    return cast(T, value)


def as_array(values: Any, name: str, error: type[Exception] = TypeError) -> npt.NDArray[Any]:
    """Return what is array-like as an array; else `error`."""
    try:
        return np.asarray(values)
    except Exception as why:  # ragged lists, and what a foreign object raises that is asked for its array
        raise error(f"{name}={spell(values)} is no array ({spell(why)}); pass one of NumPy") from None


def items(values: Any, name: str, what: str) -> Iterator[Any]:
    """Return what iterates over `values`; else TypeError says to pass `what`."""
    try:
        return iter(values)
    except Exception:  # TypeError, or a foreign object's own
        raise TypeError(f"{name}={spell(values)} is of type {type(values).__name__}; pass {what}") from None


def flag(value: Any, name: str) -> bool:
    """Return `value` as a bool if it is one, NumPy's too, or 0 or 1; else TypeError."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise TypeError(f"{name}={spell(value)} is of type {type(value).__name__}; pass True or False")
