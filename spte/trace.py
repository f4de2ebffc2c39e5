"""Write traces: which 4 KiB pages a program wrote in each epoch (`spte-trace/1`, a NumPy `.npz`).

========== ======================== ====================================================================
array      dtype, shape             meaning
========== ======================== ====================================================================
``t_ns``   int64 [E+1]              epoch e lasts from t_ns[e] to t_ns[e+1], ns since the start
``indptr`` int64 [E+1]              epoch e wrote gfn[indptr[e]:indptr[e+1]]
``gfn``    uint32 or uint64 [N]     page numbers, ascending and distinct inside an epoch
``npages`` int64                    size of the page space, a multiple of 512 (one 2 MiB region)
``meta``   str                      a JSON object: format, command, how, interval_s, page_size
========== ======================== ====================================================================
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import math
import os
import stat
import warnings
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

FORMAT = "spte-trace/1"
PAGE_SIZE = 4096
PAGES_PER_2M = 512
MAX_NPAGES = (1 << 31) - 1
"""Pages that one memslot can hold (KVM_MEM_MAX_NR_PAGES), hence the largest page space."""
MAX_BYTES = 1 << 30
"""Arrays of a file may unpack to 1 GiB in all; more is refused before anything is unpacked."""
SHIPPED = ("redis", "sqlite")
"""Recorded programs in the package: redis-server under redis-benchmark, sqlite3 in memory."""
_MAX_META_BYTES = 1 << 20
_ARRAYS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "t_ns": (("<i8",), 1),
    "indptr": (("<i8",), 1),
    "gfn": (("<u4", "<u8"), 1),
    "npages": (("<i8",), 0),
    "meta": (("<U",), 0),
}
Int64Array = npt.NDArray[np.int64]
GfnArray = npt.NDArray[np.unsignedinteger[Any]]


class TraceError(ValueError):
    """A write trace that is damaged, truncated, foreign, or breaks a rule of `spte-trace/1`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Which pages were written in each epoch; immutable, every rule of the format holds.

    Parameters
    ----------
    t_ns : int64 [E+1]
        Bounds of the epochs in ns since the start, never decreasing.
    indptr : int64 [E+1]
        Bounds of the epochs in `gfn`.
    gfn : uint32 or uint64 [N]
        Page numbers, ascending and distinct inside an epoch, each below `npages`.
    npages : int
        Size of the page space in 4 KiB pages, a multiple of 512.
    meta : mapping
        What the recorder says about itself; `format` and `page_size` are filled in when they are missing.

    Raises
    ------
    TraceError
        If a rule does not hold; the message names the value.
    """

    t_ns: Int64Array
    indptr: Int64Array
    gfn: GfnArray
    npages: int
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        meta = {"format": FORMAT, "page_size": PAGE_SIZE, **self.meta}
        object.__setattr__(self, "meta", meta)
        _check_meta(meta)
        for name in ("t_ns", "indptr", "gfn"):
            own = np.array(getattr(self, name), order="C")
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        _check_arrays(self.t_ns, self.indptr, self.gfn, self.npages)
        object.__setattr__(self, "npages", int(self.npages))

    @property
    def nepochs(self) -> int:
        """Number of epochs."""
        return len(self.indptr) - 1

    @property
    def writes(self) -> int:
        """Page writes of all epochs together (a page counts once in each epoch that wrote it)."""
        return len(self.gfn)

    @property
    def duration_ns(self) -> int:
        """From the start of the first epoch to the end of the last, ns."""
        return int(self.t_ns[-1] - self.t_ns[0])

    @property
    def command(self) -> str:
        """What ran, in the recorder's words; unprintable characters are escaped."""
        text = str(self.meta.get("command", ""))
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)

    def epoch(self, index: int) -> GfnArray:
        """Return a read-only view of the pages that epoch `index` (0 <= index < nepochs) wrote, ascending."""
        if not 0 <= index < self.nepochs:
            raise IndexError(f"epoch {index} of a trace with {self.nepochs} epochs")
        return self.gfn[self.indptr[index] : self.indptr[index + 1]]


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
    name = ascii(os.fspath(path))[1:-1]
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


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write `trace` to `path` as a compressed `.npz`; `load` gives back the same arrays and meta.

    Parameters
    ----------
    trace : Trace
        What to write.
    path : path
        The file to create or replace; the name is taken as it is, no suffix is added.

    Raises
    ------
    OSError
        If the file can not be written.
    """
    with open(path, "wb") as stream:
        np.savez_compressed(
            stream,
            t_ns=trace.t_ns,
            indptr=trace.indptr,
            gfn=trace.gfn,
            npages=np.int64(trace.npages),
            meta=np.str_(json.dumps(dict(trace.meta))),
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
    if name not in SHIPPED:
        raise TraceError(f"no trace {name!a} ships in the package; there are {', '.join(SHIPPED)}")
    with (importlib.resources.files("spte") / "data" / f"{name}.npz").open("rb") as stream:
        return _read(stream)


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
    expected = [f"{name}.npy" for name in _ARRAYS]
    missing = [name for name in expected if name not in names]
    if missing:
        raise TraceError(f"array {missing[0].removesuffix('.npy')!r} is missing: not a {FORMAT} file")
    if len(names) != len(expected):
        foreign = next((name for name in names if name not in expected), names[0])
        raise TraceError(f"holds {foreign!a} besides or twice among the arrays of {FORMAT}: {', '.join(_ARRAYS)}")
    total = sum(info.file_size for info in archive.infolist())
    if total > MAX_BYTES:
        raise TraceError(f"unpacks to {total} bytes, more than the {MAX_BYTES} allowed; record fewer epochs")
    arrays = {}
    for name, (kinds, ndim) in _ARRAYS.items():
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


def _check_meta(meta: Mapping[str, Any]) -> None:
    if meta["format"] != FORMAT:
        raise TraceError(f"format is {ascii(meta['format'])[:80]}; this reads {FORMAT!r}")
    if meta["page_size"] != PAGE_SIZE:
        raise TraceError(f"page_size is {ascii(meta['page_size'])[:80]}; KVM logs pages of {PAGE_SIZE} bytes")


def _check_arrays(t_ns: Int64Array, indptr: Int64Array, gfn: GfnArray, npages: int) -> None:
    for name, array in (("t_ns", t_ns), ("indptr", indptr), ("gfn", gfn)):
        if array.dtype.str not in _ARRAYS[name][0] or array.ndim != 1:
            wanted = " or ".join(np.dtype(kind).name for kind in _ARRAYS[name][0])
            raise TraceError(f"{name} is {array.dtype} of shape {array.shape}; it must be {wanted} in one dimension")
    if not 0 < npages <= MAX_NPAGES or npages % PAGES_PER_2M:
        raise TraceError(f"npages is {npages}; it must be a multiple of {PAGES_PER_2M} from 512 to {MAX_NPAGES}")
    if len(indptr) < 2 or len(t_ns) != len(indptr):
        raise TraceError(f"t_ns has {len(t_ns)} bounds, indptr {len(indptr)}; both need epochs + 1, at least 2")
    if t_ns[0] < 0:
        raise TraceError(f"t_ns[0] is {t_ns[0]}; time is counted from the start, 0 or more ns")
    if indptr[0] != 0 or indptr[-1] != len(gfn):
        raise TraceError(f"indptr goes from {indptr[0]} to {indptr[-1]}; it must go from 0 to len(gfn) = {len(gfn)}")
    for name, bounds in (("t_ns", t_ns), ("indptr", indptr)):
        falls = np.flatnonzero(bounds[1:] < bounds[:-1])
        if len(falls):
            at = int(falls[0])
            raise TraceError(f"{name}[{at + 1}] is {bounds[at + 1]} after {bounds[at]}; {name} must never decrease")
    outside = np.flatnonzero(gfn >= npages)
    if len(outside):
        at = int(outside[0])
        raise TraceError(f"gfn[{at}] is {gfn[at]}; it must be below npages = {npages}")
    stuck = gfn[1:] <= gfn[:-1]
    starts = indptr[1:-1]
    stuck[starts[(starts > 0) & (starts < len(gfn))] - 1] = False
    found = np.flatnonzero(stuck)
    if len(found):
        at = int(found[0])
        epoch = int(np.searchsorted(indptr, at, side="right")) - 1
        raise TraceError(f"gfn[{at + 1}] is {gfn[at + 1]} after {gfn[at]} in epoch {epoch}; pages must ascend there")


def _one_line(error: BaseException) -> str:
    return ascii(" ".join(str(error).split()) or type(error).__name__)[1:-1][:120]
