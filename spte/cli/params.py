"""What verbs share: option values, each refused with one line that holds the value and the way out; the line about the first run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import click

from spte._files import destination
from spte._numba import jit as _jit
from spte.platform import PAGE_SIZE
from spte.profile.columns import INITIALLY_SET, Log

_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
_NS = {"s": 1e9, "ms": 1e6, "us": 1e3, "ns": 1.0}
_POWERS_OF_1000 = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def size(text: str) -> int:
    """Return the bytes that `text` spells: digits and at most one of K, M, G, T, P (powers of 1024)."""
    match = re.fullmatch(r"([0-9]{1,19})([KMGTP]?)(?:i?B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None or not int(match[1]):
        raise click.BadParameter(f"{text[:40]!r} is no size above 0; take a number and K, M, G or T, like 512M")
    return int(match[1]) << _SHIFTS[match[2].upper()]


def log_mode(text: str) -> Log:
    """Return the way to log that `text` spells: bitmap, manual, initially-set, ring=SIZE, or ring=SIZE and one of the middle two."""
    words = text.strip().split(",")
    ring = words.pop(0).partition("=")[2] if words[0].startswith("ring=") else ""
    manual = {(): 0, ("bitmap",): 0, ("manual",): 1, ("initially-set",): INITIALLY_SET}.get(tuple(words))
    if manual is None or (not ring and not words) or (ring and words == ["bitmap"]):
        raise click.BadParameter(f"{text[:40]!r} is no way to log; take bitmap, manual, initially-set or ring=SIZE, like ring=64K")
    return Log(manual, size(ring) if ring else 0)


def address(text: str) -> int:
    """Return the guest-physical address that `text` spells: 0x and hexadecimal digits, 0, or a size such as 4G."""
    spelled = text.strip().lower()
    if re.fullmatch(r"0x[0-9a-f]{1,16}|0", spelled):
        return int(spelled, 16)
    return size(text)


def target(*suffixes: str, stream: bool = False) -> Callable[[str], Path]:
    """Return the type of a file to be written later, named with one of `suffixes`: refused now if that can not work.

    With `stream` it is written from start to end, so that a device or a FIFO will do; else a whole new one may take its place.
    """

    def file(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix.lower() not in suffixes:
            raise click.BadParameter(f"{text!r} does not end in {' or '.join(suffixes)}; name the file so")
        if path.is_dir():
            raise click.BadParameter(f"{text!r} is a directory; name a file")
        if not path.parent.is_dir():
            raise click.BadParameter(f"{text!r}: there is no directory {str(path.parent)!r}; make it first")
        if stream and path.exists() and os.access(path, os.W_OK):
            return path
        try:
            folder = Path(destination(path)).parent
        except OSError as error:
            raise click.BadParameter(f"{text!r} can not be written ({error.strerror}); take another place") from None
        if not folder.is_dir():
            raise click.BadParameter(f"{text!r}: there is no directory {str(folder)!r}; make it first")
        if not os.access(folder, os.W_OK):
            raise click.BadParameter(f"{text!r} can not be written; take another place")
        return path

    return file


def spell_size(count: float) -> str:
    """Return `count` bytes in the largest unit that keeps the number at 1 or more, such as ``"348 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


BYTES_PER_PAGE = 8 * 513 / 512 + 2 / 8 + 1
"""Bytes a page of a guest mapped at 4 KiB takes: the SPTE and its share of upper tables, two bitmaps, one flag of the check."""


def refuse_too_large(npages: int, bytes_per_page: float, what: str = "a guest of") -> None:
    """Refuse a guest of `npages` pages, `bytes_per_page` each, whose tables this host can not hold; `what` begins the line."""
    need, have = npages * bytes_per_page, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise click.UsageError(
            f"{what} {spell_size(npages * PAGE_SIZE)} may need {spell_size(need)} for its page tables and "
            f"this host has {spell_size(have)}; take less than {spell_size(have / bytes_per_page * PAGE_SIZE)}"
        )


def duration(text: str) -> int:
    """Return the ns that `text` spells: a number and one of s, ms, us, ns."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(s|ms|us|ns)", text.strip(), re.ASCII)
    ns = round(float(match[1]) * _NS[match[2]]) if match else 0
    if not ns:
        raise click.BadParameter(f"{text[:40]!r} is no time above 0; take a number and s, ms, us or ns, like 100ms")
    return ns


def rate(text: str) -> int:
    """Return the bytes a second that `text` spells: a number and KB/s, MB/s or GB/s (powers of 1000), or KiB/s and so on."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([KMGT]?)(i?)B/s", text.strip(), re.ASCII | re.IGNORECASE)
    power = _POWERS_OF_1000[match[2].upper()] if match else 0
    bytes_per_s = round(float(match[1]) * (1024 if match[3] else 1000) ** power) if match else 0
    if not bytes_per_s:
        raise click.BadParameter(f"{text[:40]!r} is no rate above 0; take a number and MB/s or GB/s, like 500MB/s")
    return bytes_per_s


def bandwidth(text: str) -> int:
    """Return the bytes a second that `text` spells: a number and Mbit, Gbit or the like (powers of 1000), or what `rate` takes."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)([KMGT]?)bit(?:/s)?", text.strip(), re.ASCII | re.IGNORECASE)
    if match is None and re.search(r"B/s\s*$", text, re.IGNORECASE):
        return rate(text)
    bytes_per_s = round(float(match[1]) * 1000 ** _POWERS_OF_1000[match[2].upper()] / 8) if match else 0
    if not bytes_per_s:
        raise click.BadParameter(f"{text[:40]!r} is no bandwidth above 0; take a number and Mbit or Gbit, like 10Gbit, or MB/s")
    return bytes_per_s


def spell_bandwidth(bytes_per_s: float) -> str:
    """Return `bytes_per_s` in bits, in the largest unit that keeps the number at 1 or more, such as ``"10 Gbit/s"``."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bytes_per_s * 8 >= scale:
            return f"{bytes_per_s * 8 / scale:.4g} {unit}bit/s"
    return f"{bytes_per_s * 8:.4g} bit/s"


def spell_time(seconds: float) -> str:
    """Return `seconds` in the largest unit that keeps the number at 1 or more, such as ``"49.5 ms"``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def announce_compilation() -> None:
    """Say on stderr that kernels will be compiled, unless the cache has them."""
    if not _jit.is_warm():
        click.echo("spte: first run: compiling the kernels for this machine, less than a minute, once", err=True)
