"""One input: a file or a stream, read in blocks of bounded size, with the line or offset of whatever is wrong in it."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from spte.trace import TraceError

Bytes = npt.NDArray[np.uint8]
Positions = npt.NDArray[np.int64]
Progress = Callable[[int, int | None], None]
"""Called with the bytes read so far of all inputs, and how many there are (None: nobody knows, it is a stream)."""

HEAD = 1 << 16
"""Bytes at the beginning by which the format is chosen."""
BLOCK = 1 << 20
"""Bytes of text that are parsed together: all arrays on the way fit into a cache or two."""
MAX_LINE = 1 << 16
"""Bytes of the longest line; what has longer ones is no text."""
PIECE = 1 << 20
"""Bytes of one read: what a file promises is not allocated before it is there."""
PAD = 8
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE = 10


@dataclasses.dataclass(frozen=True)
class Block:
    """Whole lines of a text.

    `data` uint8 [n + PAD] holds them, and PAD zeros so that a few bytes may be read from any place; `ends` int64 [lines]
    are the places of their newlines, and `first_line` the number of the first, from 1.
    """

    source: Source
    data: Bytes
    ends: Positions
    first_line: int

    @functools.cached_property
    def starts(self) -> Positions:
        """Place of the first byte of each line, int64 [lines]."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1] + 1])

    def line_of(self, place: Positions) -> Positions:
        """Return the index in this block of the line that holds each place."""
        return np.searchsorted(self.ends, place)

    def text(self, line: int) -> str:
        """Return line `line` of this block, shortened and with unprintable characters escaped, for an error."""
        return shown(self.data[int(self.starts[line]) : int(self.ends[line])].tobytes())

    def error_at(self, lines: Positions, at: int, why: str) -> TraceError:
        """Return `error` for the line of this block that ``lines[at]`` is."""
        return self.error(int(lines[at]), why)

    def error(self, line: int, why: str) -> TraceError:
        """Return an error that names the file, the number of line `line` of this block, its text, and `why`."""
        return self.source.error(f"line {self.first_line + line}: {self.text(line)!r} {why}")


class Source:
    """An input by its name and its stream; `head` are its first bytes, which stay to be read."""

    def __init__(self, name: str, stream: IO[bytes], size: int | None) -> None:
        self.name = name
        self.size = size
        self.done = 0
        self.where = "offset 0"
        self.progress: Callable[[], None] = lambda: None
        self._stream = stream
        self.head = self._read(HEAD)
        self._unread = self.head

    def telling(self) -> tuple[bytes, bool]:
        """Return bytes that tell the format, and whether they do: the head, or the file's first block of as many that is not all zero.

        They do not where a stream goes on after a head of zeros, which is given only once.
        """
        if any(self.head) or len(self.head) < HEAD:
            return self.head, True
        if self.size is None:
            return self.head, self.at_end(HEAD)
        block = b""
        while not any(block) and (more := self._read(HEAD)):
            block = more
        self._stream.seek(HEAD)
        return block or self.head, True

    def error(self, why: str) -> TraceError:
        """Return an error that begins with the input's name."""
        return TraceError(f"{self.name}: {why}")

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer only at the end."""
        taken, self._unread = self._unread[:count], self._unread[count:]
        if len(taken) < count:
            taken += self._read(count - len(taken))
        if taken:
            self.where = f"offset {self.done}"
        self.done += len(taken)
        self.progress()
        return taken

    def at_end(self, ahead: int = 0) -> bool:
        """Return whether the input has no byte after the next `ahead`."""
        if len(self._unread) <= ahead:
            self._unread += self._read(HEAD)
        return len(self._unread) <= ahead

    def blocks(self) -> Iterator[Block]:
        """Yield the text in blocks of whole lines.

        Raises
        ------
        TraceError
            At the end if the last line has no newline: that is how a text looks that was cut off.
        """
        line, rest = 1, b""
        while more := self.read(BLOCK):
            text = rest + more if self.done > len(more) else more.removeprefix(BYTE_ORDER_MARK)
            cut = text.rfind(b"\n") + 1
            rest = text[cut:]
            if cut:
                data = np.frombuffer(text[:cut] + bytes(PAD), np.uint8)
                ends = np.flatnonzero(data == NEWLINE)
                self._check_lengths(ends, line)
                self.where = f"lines {line} to {line + len(ends) - 1}"
                yield Block(self, data, ends, line)
                line += len(ends)
            if len(rest) > MAX_LINE:
                raise self.error(f"line {line} is longer than {MAX_LINE} bytes; this is no text of one write a line")
        if rest:
            raise self.error(
                f"line {line}: {shown(rest)!r} has no newline at its end: the text was cut off; if it is whole, add a newline"
            )

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def _check_lengths(self, ends: Positions, line: int) -> None:
        long = np.flatnonzero(np.diff(ends, prepend=-1) > MAX_LINE)
        if len(long):
            raise self.error(f"line {line + int(long[0])} is longer than {MAX_LINE} bytes; this is no text of one write a line")

    def _read(self, count: int) -> bytes:
        parts = []
        try:
            # A pipe may give less than was asked for before its end.
            while count and (part := self._stream.read(min(count, PIECE))):
                parts.append(part)
                count -= len(part)
        except OSError as error:
            raise self.error(f"can not be read: {error.strerror or error}") from None
        return b"".join(parts)


def open_source(given: str | os.PathLike[str] | IO[bytes]) -> Source:
    """Open a path, or take a binary stream as it is.

    Raises
    ------
    TraceError
        If the path can not be opened or is no file or pipe.
    """
    if not isinstance(given, str | os.PathLike):
        name = getattr(given, "name", None)
        return Source(name if isinstance(name, str) else "<stream>", given, None)
    path = Path(given)
    name = ascii(os.fspath(given))[1:-1]
    try:
        stream = path.open("rb", buffering=0)
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TraceError(f"{name}: can not be read: {reason}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        stream.close()
        raise TraceError(f"{name}: not a file or a pipe")
    try:
        return Source(name, stream, os.fstat(stream.fileno()).st_size if stat.S_ISREG(mode) else None)
    except TraceError:
        stream.close()
        raise


def shown(line: bytes) -> str:
    """Return a line for an error: at most 60 characters, all printable."""
    text = line.decode("ascii", "backslashreplace").rstrip("\r\n")
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 60 else text[:57] + "..."
