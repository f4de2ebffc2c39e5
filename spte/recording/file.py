"""Recordings of real KVM, op by op, in and out: files of JSON lines, plain, compressed, or many in one archive.

A recording opens with a header (format, kernel, config, module parameters, scenario); each further line is one op with
its inputs and all that KVM did. `read` refuses with one line whatever is not that.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt

from spte.recording.ops import OPS, RecordingError, check_args, is_int, short
from spte.recording.shapes import check_shapes

FORMAT = "kvm-dirty-golden/1"
ARCHIVES = (".tar", ".tar.xz", ".tar.gz", ".txz", ".tgz")
__all__ = [
    "FORMAT", "Recording", "RecordingError", "bitmap_of", "bits_of", "dumps", "expand", "find", "parse", "read", "read_all",
    "runs_of", "write",
]  # fmt: skip

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", *ARCHIVES)
SIZE_LIMIT = 1 << 30  # bytes of one recording after decompression; the largest known is 1 MiB

_HEADER = {"format": str, "kernel": str, "config": str, "params": dict, "scenario": str}


@dataclass(frozen=True, slots=True)
class Recording:
    """One recording.

    Parameters
    ----------
    name : str
        Where it came from: a path, or ``archive:member``.
    header : dict
        The first line: format, kernel, config, params, scenario.
    records : list of dict
        One an op, in order; ``records[i]["i"] == i``.
    """

    name: str
    header: dict[str, Any]
    records: list[dict[str, Any]]


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Return the recordings and archives that `paths` name; directories are searched through and through.

    Raises
    ------
    RecordingError
        A path does not exist.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif path.exists():
            found.append(path)
        else:
            raise RecordingError(f"{path}: no such file or directory")
    return found


def read_all(path: str | Path) -> Iterator[Recording]:
    """Yield the recordings in the file `path`: one, or each of an archive.

    Raises
    ------
    RecordingError
        The file, or a member of it, is not a recording; says which line and why.
    """
    path = Path(path)
    if not path.name.endswith(ARCHIVES):
        yield parse(str(path), _bytes_of(path))
        return
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    name = f"{path}:{member.name}"
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield parse(name, _limited(stream, name))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(":")
        raise RecordingError(f"{path}: not a readable archive of recordings ({reason})") from None


def read(path: str | Path) -> Recording:
    """Return the one recording of the file `path`; RecordingError if there are more, or none."""
    recordings = list(read_all(path))
    if len(recordings) != 1:
        raise RecordingError(f"{path}: holds {len(recordings)} recordings where one is needed; unpack it and name one")
    return recordings[0]


def _limited(stream: IO[bytes], name: str) -> bytes:
    data = stream.read(SIZE_LIMIT + 1)
    if len(data) > SIZE_LIMIT:
        raise RecordingError(f"{name}: more than {SIZE_LIMIT >> 20} MiB, too large for a recording")
    return data


def _open(path: Path, mode: Literal["rb", "wb"]) -> IO[bytes]:
    """Open `path`, compressed if its name says so."""
    if path.suffix == ".gz":
        return cast("IO[bytes]", gzip.open(path, mode))
    return cast("IO[bytes]", lzma.open(path, mode)) if path.suffix == ".xz" else path.open(mode)


def _bytes_of(path: Path) -> bytes:
    try:
        with _open(path, "rb") as stream:
            return _limited(stream, str(path))
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise RecordingError(f"{path}: can not be read ({error})") from None


def parse(name: str, data: bytes) -> Recording:
    """Return the recording that the bytes `data` hold; `name` stands in messages.

    Raises
    ------
    RecordingError
        Empty, not text, a line that is not a JSON object, a foreign format, ops out of order, arguments that are
        missing or of the wrong type or size.
    """
    if not data.strip():
        raise RecordingError(f"{name}: empty, not a recording")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordingError(f"{name}: not a recording: byte {error.start} is not UTF-8 text") from None
    lines = text.split("\n")
    header = _object(name, 1, lines[0])
    _check_header(name, header)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            record = _object(name, number, line)
            _check_record(f"{name}: line {number}", record, len(records))
            records.append(record)
    if not records:
        raise RecordingError(f"{name}: a header without a single op")
    return Recording(name, header, records)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _object(name: str, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error).split(";")[0]
        raise RecordingError(f"{name}: line {number} is not JSON, or is cut off ({reason})") from None
    if not isinstance(value, dict):
        raise RecordingError(f"{name}: line {number} is {short(value)}, not a JSON object")
    return value


def _check_header(name: str, header: Mapping[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise RecordingError(f"{name}: format is {short(header.get('format'))}, not {FORMAT!r}")
    for key, kind in _HEADER.items():
        if not isinstance(header.get(key), kind):
            raise RecordingError(f"{name}: header key {key!r} is {short(header.get(key))}, not a {kind.__name__}")


def _check_record(where: str, record: Mapping[str, Any], index: int) -> None:
    if record.get("i") != index or not is_int(record["i"]):
        raise RecordingError(f"{where}: i is {short(record.get('i'))} where {index} follows; an op is lost or doubled")
    op = record.get("op")
    if not isinstance(op, str):
        raise RecordingError(f"{where}: op is {short(op)}, not a name")
    if "args" not in record:
        raise RecordingError(f"{where}: {op} has no args")
    check_shapes(record, where)
    if op in OPS:
        check_args(op, record["args"], where)


def dumps(record: Mapping[str, Any]) -> str:
    """Return `record` as one line of a recording, without the line end."""
    return json.dumps(record, separators=(",", ":"))


def write(path: str | Path, header: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """Write a recording to `path`; compressed if the name ends in ``.gz`` or ``.xz``.

    Raises
    ------
    RecordingError
        The file can not be written.
    """
    path = Path(path)
    try:
        with _open(path, "wb") as raw, io.TextIOWrapper(raw, "utf-8", newline="\n") as stream:
            for record in (header, *records):
                stream.write(dumps(record) + "\n")
    except OSError as error:
        raise RecordingError(f"{path}: can not be written ({error.strerror or error})") from None


def expand(runs: Iterable[tuple[int, int] | list[int]]) -> npt.NDArray[np.int64]:
    """Return the numbers that the runs ``[first, count]`` name, in their order, as int64."""
    pieces = [np.arange(first, first + count, dtype=np.int64) for first, count in runs]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def runs_of(numbers: npt.NDArray[np.int64]) -> list[list[int]]:
    """Return the ascending integers `numbers` as maximal runs ``[first, count]``."""
    if not numbers.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers) != 1) + 1))
    counts = np.diff(np.concatenate((starts, [numbers.size])))
    return [[int(first), int(count)] for first, count in zip(numbers[starts], counts, strict=True)]


def bits_of(bitmap: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the indices of the set bits of a uint64 bitmap, ascending (bit 0 = page 0)."""
    octets = bitmap.astype("<u8").view(np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little")).astype(np.int64)


def bitmap_of(pages: npt.NDArray[np.int64], npages: int) -> npt.NDArray[np.uint64]:
    """Return a uint64 bitmap of `npages` bits, rounded up to 64, with the bits `pages` set; later ones are dropped."""
    words = -(-npages // 64)
    flags = np.zeros(words * 64, np.uint8)
    flags[pages[pages < flags.size]] = 1
    return np.packbits(flags, bitorder="little").view("<u8").astype(np.uint64)
