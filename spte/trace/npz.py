"""`spte-trace/1` files: nothing in them is executed, nothing is unpacked before its size is known."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import stat
import warnings
import zipfile
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from spte._arguments import instance, spell
from spte._files import replacing
from spte.trace.model import ARRAYS, FORMAT, MAX_BYTES, Trace, TraceError

_MAX_META_BYTES = 1 << 20
SHIPPED = ("redis", "sqlite")
"""Recorded programs in the package: redis-server under redis-benchmark, sqlite3 in memory."""
_MAX_NAME = 1 << 12  # no file has a longer one


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a `spte-trace/1` file.

    Parameters
    ----------
    path : path
        An `.npz` file. Nothing in it is executed (no pickles), and nothing larger than `MAX_BYTES` is unpacked.

    Returns
    -------
    Trace
        The trace; all rules of the format hold.

    Raises
    ------
    TraceError
        If the file can not be read, or is not a whole and valid trace; one line that begins with the path.
    """
    name = ascii(_checked(path))[1:-1]
    name = name if len(name) < _MAX_NAME else spell(name)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise TraceError("not a regular file")
        with open(path, "rb") as stream:
            return _read(stream)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise TraceError(f"{name}: can not be read: {reason}") from None
    except TraceError as error:
        raise TraceError(f"{name}: {error}") from None


def _checked(path: Any) -> str:
    try:
        name = os.fsdecode(path)
    except Exception:  # TypeError, or a foreign object's own
        raise TypeError(f"path={spell(path)} is of type {type(path).__name__}; pass a path") from None
    if "\0" in name:
        raise TraceError(f"path={spell(name)} has a NUL byte; no file has such a name")
    return name


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path` as a compressed `.npz`; `load` gives back the same arrays and meta.

    Parameters
    ----------
    trace : Trace
        What to write.
    path : path
        The file to create or replace; the name is taken as it is, no suffix is added, and a symbolic link is followed.

    Raises
    ------
    OSError
        If the file can not be written, or there is something of that name that is no regular file; an older file is as before.
    TraceError
        If `meta` has values that JSON does not know; no file is made.
    """
    instance(trace, "trace", Trace, "a Trace")
    name = _checked(path)
    try:
        meta = json.dumps(dict(trace.meta))
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(f"meta is not JSON ({_one_line(error)}); take what is") from None
    with replacing(name) as stream:
        np.savez_compressed(
            stream,
            t_ns=trace.t_ns,
            indptr=trace.indptr,
            gfn=trace.gfn,
            npages=np.int64(trace.npages),
            meta=np.str_(meta),
        )


def default_trace() -> Trace:
    """Return the trace of sqlite3 in memory that ships in the package: 54 epochs of 50 ms."""
    return shipped("sqlite")


def shipped(name: str) -> Trace:
    """Return a trace that ships in the package.

    Parameters
    ----------
    name : str
        One of `SHIPPED`.

    Raises
    ------
    TraceError
        If there is none of that name.
    """
    if instance(name, "name", str, "the name of a trace") not in SHIPPED:
        raise TraceError(f"no trace {spell(name)} ships in the package; there are {', '.join(SHIPPED)}")
    with (importlib.resources.files("spte") / "data" / f"{name}.npz").open("rb") as stream:
        return _read(stream)


def named(name: str) -> Trace:
    """Return the trace of a name: one of `SHIPPED`, else a file.

    Parameters
    ----------
    name : str
        Name or path.

    Raises
    ------
    TraceError
        If there is no such file, or it is no trace.
    """
    return shipped(name) if instance(name, "name", str, "a name or a path") in SHIPPED else load(name)


def _read(stream: IO[bytes]) -> Trace:
    try:
        with zipfile.ZipFile(stream) as archive:
            arrays = _unpack(archive)
    except TraceError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy's header parser raise a dozen kinds on foreign bytes
        raise TraceError(f"not a whole .npz file ({_one_line(error)}); copy or record it again") from None
    try:
        meta = json.loads(str(arrays["meta"]))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"meta is not JSON ({_one_line(error)}); expected an object with format={FORMAT!r}") from None
    if not isinstance(meta, dict):
        raise TraceError(f"meta is a JSON {type(meta).__name__}; expected an object with format={FORMAT!r}")
    if "format" not in meta:
        raise TraceError(f"meta has no format; this reads {FORMAT!r}")
    return Trace(arrays["t_ns"], arrays["indptr"], arrays["gfn"], int(arrays["npages"]), meta)


def _unpack(archive: zipfile.ZipFile) -> dict[str, npt.NDArray[Any]]:
    names = [info.filename for info in archive.infolist()]
    expected = [f"{name}.npy" for name in ARRAYS]
    missing = [name for name in expected if name not in names]
    if missing:
        raise TraceError(f"array {missing[0].removesuffix('.npy')!r} is missing: not a {FORMAT} file")
    if len(names) != len(expected):
        foreign = next((name for name in names if name not in expected), names[0])
        raise TraceError(f"holds {foreign!a} besides or twice among the arrays of {FORMAT}: {', '.join(ARRAYS)}")
    total = sum(info.file_size for info in archive.infolist())
    if total > MAX_BYTES:
        raise TraceError(f"unpacks to {total} bytes, more than the {MAX_BYTES} allowed; record fewer epochs")
    arrays = {}
    for name, (kinds, ndim) in ARRAYS.items():
        with archive.open(f"{name}.npy") as member:
            _check_header(name, member, archive.getinfo(f"{name}.npy").file_size, kinds, ndim)
        # Read from a fresh handle and to its end: the archive checks a member's CRC only there.
        with archive.open(f"{name}.npy") as member:
            arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
            member.read(1)
    return arrays


def _check_header(name: str, member: IO[bytes], size: int, kinds: tuple[str, ...], ndim: int) -> None:
    """Compare what the header of one `.npy` promises with the format, and with the bytes there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.hasobject or not dtype.str.startswith(kinds):
        wanted = " or ".join("str" if kind == "<U" else np.dtype(kind).name for kind in kinds)
        raise TraceError(f"{name} has dtype {dtype.str}; {FORMAT} wants {wanted} (little-endian)")
    if len(shape) != ndim:
        raise TraceError(f"{name} has shape {shape}; {FORMAT} wants {ndim} dimension(s)")
    if name == "meta" and dtype.itemsize > _MAX_META_BYTES:
        raise TraceError(f"meta has {dtype.itemsize} bytes, more than the {_MAX_META_BYTES} allowed")
    promised = member.tell() + math.prod(shape) * dtype.itemsize
    if promised != size:
        raise TraceError(f"{name} has {size} bytes where its header promises {promised}; copy or record it again")


def _one_line(error: BaseException) -> str:
    return ascii(" ".join(str(error).split()) or type(error).__name__)[1:-1][:120]
