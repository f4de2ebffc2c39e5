"""The text of a `guest_seq` op, several steps of L1 and L2 in one KVM_RUN, as a list of steps."""

from __future__ import annotations

import re
from typing import NamedTuple

_ACCESSES = {
    "w": "write", "r": "read", "m": "rmw", "c": "cmpxchg_fail", "b": "read_write", "x": "exec", "o": "insb",
}  # fmt: skip
_BARE = {"e": "enter", "l": "leave", "i": "invept"}

# 13 decimal digits hold every page number, and no text of digits is long enough to cost time.
_NUMBER = r"(?:0[xX][0-9a-fA-F]{1,13}|[0-9]{1,13})"
_RUN = rf"{_NUMBER}(?:-{_NUMBER})?"
_ACCESS_STEP = re.compile(rf"([{''.join(_ACCESSES)}]):({_RUN}(?:,{_RUN})*)")
_SWITCH_STEP = re.compile(rf"S:({_NUMBER})")
_PROTECT_STEP = re.compile(rf"P:({_RUN})=([0-7])([da]?)")
_REMAP_STEP = re.compile(rf"R:({_RUN})=({_NUMBER})")


class Step(NamedTuple):
    """One step of a sequence.

    Parameters
    ----------
    kind : str
        ``enter`` or ``leave`` L2; an access by whoever runs, named as in the ops of one access (``write``, ``read``,
        ``rmw``, ``cmpxchg_fail``, ``read_write``, ``exec``, ``insb``); what L1 does with its tables for L2:
        ``invept``, ``switch``, ``protect``, ``remap``.
    runs : tuple of (int, int)
        Pages ``(first, count)`` of an access, or the L2 pages of ``protect`` and ``remap``.
    value : int
        The root of ``switch``, the permissions of ``protect``, the first L1 gfn of ``remap``.
    clears : str
        Flags that ``protect`` clears: none, ``d`` D, ``a`` A and D.
    """

    kind: str
    runs: tuple[tuple[int, int], ...] = ()
    value: int = 0
    clears: str = ""


def parse_seq(text: str) -> list[Step]:
    """Return the steps that `text` names, in order.

    Raises
    ------
    ValueError
        A step does not follow the grammar; its message goes on after the name of the text.
    """
    return [_step(step) for step in text.split("/")]


def _step(text: str) -> Step:
    if text in _BARE:
        return Step(_BARE[text])
    if match := _ACCESS_STEP.fullmatch(text):
        return Step(_ACCESSES[match[1]], tuple(_run(text, run) for run in match[2].split(",")))
    if match := _SWITCH_STEP.fullmatch(text):
        return Step("switch", value=_number(match[1]))
    if match := _PROTECT_STEP.fullmatch(text):
        return Step("protect", (_run(text, match[1]),), int(match[2]), match[3])
    if match := _REMAP_STEP.fullmatch(text):
        return Step("remap", (_run(text, match[1]),), _number(match[2]))
    raise ValueError(f"holds the step {_shown(text)}, which is none of the format")


def _run(step: str, text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    start, end = _number(first), _number(last or first)
    if end < start:
        raise ValueError(f"holds the step {_shown(step)}, whose pages end before they begin")
    return start, end - start + 1


def _number(text: str) -> int:
    return int(text, 16 if text[:2] in ("0x", "0X") else 10)


def _shown(step: str, limit: int = 40) -> str:
    return repr(step if len(step) <= limit else step[: limit - 3] + "...")
