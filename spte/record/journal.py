"""The epochs of a recording on disk as they come, so that a recorder that is killed loses at most the last one.

A journal is `MAGIC` and then records, each a header and its payload; a record that is cut off or whose checksum is wrong ends it.
It lies beside the trace that it becomes, under that name with `SUFFIX`, and is locked while the recording runs.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from spte.platform import PAGE_SIZE
from spte.record.errors import RecordError, TargetError
from spte.record.ranges import PageSpace, RangeArray, count, merge, pack, unpack
from spte.trace import MAX_BYTES, PAGES_PER_2M, Trace, save

SUFFIX = ".journal"
MAGIC = b"spte-journal/1\n"
MAX_DESCRIBED = 4000
"""Runs of regions that `meta` describes; a trace's meta may have 1 MiB."""
_HEADER = struct.Struct("<4sIq")
"""Kind, bytes of the payload, time in ns; behind it, the checksum of header and payload, and then the payload."""
_CHECKSUM = struct.Struct("<I")
_ABOUT, _POPULATED, _EPOCH = b"ABOU", b"POPU", b"EPOC"
_MAX_PAYLOAD = MAX_BYTES * 2


class Journal:
    """A journal that is being written.

    Parameters
    ----------
    output : Path
        The trace that it becomes.

    Raises
    ------
    TargetError
        If there is a journal already: of a recording that runs, or of one that was interrupted.
    RecordError
        If it can not be written.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + SUFFIX)
        try:
            self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - open as long as the recording
        except FileExistsError:
            raise TargetError(_left_over(self.path)) from None
        except OSError as error:
            raise unwritten(self.path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._put_raw(MAGIC)
        except OSError as error:
            self.close()
            self.path.unlink()
            raise unwritten(self.path, error) from None
        self.bytes = 0
        """What the epochs so far will take in the trace."""

    def about(self, values: Mapping[str, Any]) -> None:
        """Add to what the trace's `meta` will say; later values replace earlier ones."""
        self._put(_ABOUT, 0, json.dumps(dict(values)).encode())

    def populated(self, ranges: RangeArray) -> None:
        """Note pages that are there, without a write: their regions get a place in the page space."""
        self._put(_POPULATED, 0, pack(ranges).tobytes())

    def epoch(self, t_ns: int, ranges: RangeArray) -> None:
        """Add an epoch that ended at `t_ns`, counted from the start, and wrote the pages of `ranges` (disjoint, ascending)."""
        self._put(_EPOCH, t_ns, pack(ranges).tobytes())
        self.bytes += 4 * count(ranges) + 16

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _put(self, kind: bytes, t_ns: int, payload: bytes) -> None:
        header = _HEADER.pack(kind, len(payload), t_ns)
        self._put_raw(header + _checksum(header, payload) + payload)

    def _put_raw(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


def unwritten(journal: Path, error: OSError) -> RecordError:
    """Return the refusal of a recording whose journal takes not even the first epoch."""
    return RecordError(f"{str(journal)!r}: {error.strerror}; nothing is recorded; name a place that can be written with -o")


def finish(journal: Path, output: Path) -> Trace:
    """Turn the file `journal` into the trace `output`, which appears whole or not at all, and remove it.

    Returns
    -------
    Trace
        What was written.

    Raises
    ------
    TargetError
        If it is no journal, a recording still writes it, or it holds nothing.
    RecordError
        If the trace can not be written; the journal stays, and the message names it.
    """
    try:
        file = open(journal, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise TargetError(f"{str(journal)!r} can not be read ({error.strerror}); name the {SUFFIX} file of a recording") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"{str(journal)!r} is being recorded now; end that recording (Ctrl-C) and its trace is whole") from None
        if file.read(len(MAGIC)) != MAGIC:
            raise TargetError(f"{str(journal)!r} is no journal of spte record; name the {SUFFIX} file of a recording")
        trace = _to_trace(file, str(journal))
        try:
            save(trace, output)
        except OSError as error:
            raise RecordError(
                f"{str(output)!r}: {error.strerror}; the recording is in {journal}; `spte record --recover {shlex.quote(str(journal))} "
                "-o ELSEWHERE` makes its trace"
            ) from None
        journal.unlink()
    return trace


def _to_trace(file: IO[bytes], name: str) -> Trace:
    meta: dict[str, Any] = {}
    regions: list[RangeArray] = []
    times, counts = [0], [0]
    for kind, t_ns, payload in _records(file):
        if kind == _ABOUT:
            meta |= json.loads(payload)
            continue
        ranges = unpack(np.frombuffer(payload, np.uint64))
        regions = [merge([*regions, np.stack([ranges[:, 0] // PAGES_PER_2M, -(-ranges[:, 1] // PAGES_PER_2M)], axis=1)])]
        if kind == _EPOCH:
            times.append(t_ns)
            counts.append(count(ranges))
    if len(times) == 1 or not len(regions[0]):
        raise TargetError(f"{name!r} holds no epoch; there is nothing to make a trace of: delete it")
    space = PageSpace(regions[0] * PAGES_PER_2M)
    indptr = np.cumsum(counts)
    gfn = np.empty(indptr[-1], np.uint32)
    file.seek(len(MAGIC))
    epoch = 0
    for kind, _, payload in _records(file):
        if kind == _EPOCH:
            gfn[indptr[epoch] : indptr[epoch + 1]] = space.gfns(unpack(np.frombuffer(payload, np.uint64)))
            epoch += 1
    described = space.describe()
    meta |= {"page_size": PAGE_SIZE, "ranges": described[:MAX_DESCRIBED]}
    if len(described) > MAX_DESCRIBED:
        meta["ranges_left_out"] = len(described) - MAX_DESCRIBED
    return Trace(np.array(times, np.int64), indptr.astype(np.int64), gfn, space.npages, meta)


def _records(file: IO[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield kind, time and payload of every whole record."""
    while len(header := file.read(_HEADER.size)) == _HEADER.size:
        kind, length, t_ns = _HEADER.unpack(header)
        checksum = file.read(_CHECKSUM.size)
        payload = file.read(min(length, _MAX_PAYLOAD))
        if checksum != _checksum(header, payload):
            return
        yield kind, t_ns, payload


def _checksum(header: bytes, payload: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(header)))


def _left_over(path: Path) -> str:
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{str(path)!r} is being recorded now by another spte record; give this one another name with -o"
    return (
        f"{str(path)!r} is of a recording that was interrupted; `spte record --recover {shlex.quote(str(path))}` makes its trace "
        "(-o: elsewhere), else delete the file"
    )
