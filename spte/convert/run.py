"""From inputs to a trace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import PurePath
from typing import IO, Any, NamedTuple, cast

from spte._arguments import instance, items, spell
from spte.convert.slots import Slot
from spte.convert.sniff import FORMATS, choose
from spte.convert.source import Progress, Source, open_source
from spte.convert.writes import Options, Writes
from spte.trace import Trace, TraceError
from spte.trace.build import INTERVAL_NS

_FORMAT_OPTIONS = {"slots": "--slot", "addresses": "--bytes", "time_unit": "--time-unit"}
"""Options that only some formats have, and their names on the command line."""
Input = str | os.PathLike[str] | IO[bytes]


class Converted(NamedTuple):
    """A trace, the format it was read from, and what the user should know of the conversion, a line each."""

    trace: Trace
    format: str
    notes: Sequence[str]


def convert(
    inputs: Sequence[Input],
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    interval_ns: int = INTERVAL_NS,
    npages: int | None = None,
    slots: Sequence[Slot] = (),
    addresses: bool = False,
    time_unit: str | None = None,
    squeeze: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Read page writes that another tool recorded.

    Parameters
    ----------
    inputs : sequence of paths and binary streams
        What to read, in the order of time where a file is an epoch; the streams are read to their end.
    format : str, optional
        One of `FORMATS`; by default chosen by content.
    interval_ns : int
        Length of an epoch in ns: times are binned into such epochs; where a file or a row is an epoch, it lasts so long.
    npages : int, optional
        Pages of the guest; for bitmaps also how many pages each has, if several lie in one file.
    slots : sequence of Slot
        The guest's memslots, in the order of their bitmaps or with KVM's ids; the holes between them are left out.
    addresses : bool
        Text: the second column is an address in bytes, not a page.
    time_unit : str, optional
        Text: ``"s"`` (the default), ``"ms"``, ``"us"`` or ``"ns"``.
    squeeze : bool
        Leave out the 2 MiB regions that no epoch wrote; always so for lackey.
    progress : callable, optional
        Called with the bytes read so far and their number in all, None if an input is a stream.

    Returns
    -------
    Converted
        The trace, the format, and notes.

    Raises
    ------
    TraceError
        If an input can not be read, is damaged, cut off or of no known format, or an option does not fit; one line
        that names the input and the line or offset.
    """
    options = Options(interval_ns, npages, slots, addresses, time_unit, squeeze)
    inputs = _checked(inputs)
    if format is not None and instance(format, "format", str, f"one of {', '.join(FORMATS)}") not in FORMATS:
        raise TraceError(f"format {spell(format)}; take one of {', '.join(FORMATS)}")
    with closing(_Sources(inputs, progress)) as sources:
        return _convert(sources, format, options)


def _checked(inputs: Sequence[Input]) -> Sequence[Input]:
    """Return `inputs` if they are what can be read."""
    what = "a list of paths and binary streams"
    if isinstance(inputs, str | bytes):
        raise TypeError(f"inputs={spell(inputs)} is one name; pass {what}")
    given = list(items(inputs, "inputs", what))
    if not given:
        raise TraceError("no input; name a file, or - for stdin")
    for each in given:
        if not _is_name(each) and not callable(getattr(each, "read", None)):
            raise TypeError(f"inputs holds {spell(each)}; pass {what}")
    return given


def _is_name(given: Any) -> bool:
    try:
        return isinstance(os.fspath(given), str)
    except Exception:  # TypeError, or a foreign object's own
        return False


def _convert(sources: _Sources, given_format: str | None, options: Options) -> Converted:
    kind = given_format or choose(sources.heads())
    for name, spelled in _FORMAT_OPTIONS.items():
        if getattr(options, name) and name not in FORMATS[kind].options:
            raise TraceError(f"{sources.title}: {name} ({spelled}) says nothing about {FORMATS[kind].about}; leave it out")
    writes = Writes(options)
    try:
        FORMATS[kind].read(iter(sources), writes)
    except TraceError as error:
        raise sources.located(error) from None
    writes.meta = {"command": sources.title, "how": f"converted from {FORMATS[kind].about}", **writes.meta}
    try:
        return Converted(writes.trace(), kind, writes.notes)
    except TraceError as error:
        raise TraceError("; ".join([f"{sources.title}: {error}", *writes.notes])) from None


class _Sources:
    """Opens the inputs one after the other, and tells the progress over all."""

    def __init__(self, inputs: Sequence[Input], progress: Progress | None) -> None:
        self._inputs = inputs
        self._progress = progress
        self._streams = {at: open_source(given) for at, given in enumerate(inputs) if not isinstance(given, str | os.PathLike)}
        self._total: int | None = 0
        self._before = 0
        self._now: Source | None = None
        first = self._streams[0].name if 0 in self._streams else os.fspath(cast("str", inputs[0]))
        self.title = PurePath(first).name + (f" and {len(inputs) - 1} more" if len(inputs) > 1 else "")

    def heads(self) -> Iterator[tuple[str, bytes, bool]]:
        """Yield of each input the name, bytes that tell its format, and whether they do."""
        for at in range(len(self._inputs)):
            source = self._open(at)
            told = source.telling()
            if source.size is None:
                self._streams[at] = source  # a pipe gives its bytes only once
            else:
                source.close()  # there may be more files than a process may have open
            yield source.name, *told

    def close(self) -> None:
        """Close what was opened here; streams that were given stay open."""
        for at, source in self._streams.items():
            if isinstance(self._inputs[at], str | os.PathLike):
                source.close()
        if self._now and self._now not in self._streams.values():
            self._now.close()

    def __iter__(self) -> Iterator[Source]:
        sizes = [source.size for source in self._streams.values()]
        for at in range(len(self._inputs)):
            if at not in self._streams:
                with closing(self._open(at)) as source:
                    sizes.append(source.size)
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        for at in range(len(self._inputs)):
            self._now = self._open(at)
            self._now.progress = self._tell
            yield self._now
            self._before += self._now.done
            if at not in self._streams:
                self._now.close()

    def located(self, error: TraceError) -> TraceError:
        """Return `error` with the input and the place where reading has come to, if it does not name the input itself."""
        now = self._now
        if now is None or str(error).startswith(now.name):
            return error
        return TraceError(f"{now.name}: {now.where}: {error}")

    def _open(self, at: int) -> Source:
        return self._streams[at] if at in self._streams else open_source(self._inputs[at])

    def _tell(self) -> None:
        if self._progress and self._now:
            self._progress(self._before + self._now.done, self._total)
