"""The trace as a value, and the rules that every one keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spte._arguments import as_array, instance, integer, spell
from spte.platform import PAGE_SIZE

FORMAT = "spte-trace/1"
PAGES_PER_2M = 512
MAX_NPAGES = (1 << 31) - 1
"""Pages that one memslot can hold (KVM_MEM_MAX_NR_PAGES), hence the largest page space."""
MAX_BYTES = 1 << 30
"""Arrays of a file may unpack to 1 GiB in all; more is refused before anything is unpacked."""
ARRAYS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "t_ns": (("<i8",), 1),
    "indptr": (("<i8",), 1),
    "gfn": (("<u4", "<u8"), 1),
    "npages": (("<i8",), 0),
    "meta": (("<U",), 0),
}
"""Array of a file: the dtypes it may have, and its number of dimensions."""
Int64Array = npt.NDArray[np.int64]
GfnArray = npt.NDArray[np.unsignedinteger[Any]]


class TraceError(ValueError):
    """A write trace that is damaged, truncated, foreign, or breaks a rule of `spte-trace/1`."""


class EpochError(TraceError, IndexError):
    """An epoch that a trace does not have."""


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """Return `value` if it is a mapping with names as keys; else TypeError."""
    found: Mapping[str, Any] = instance(value, name, Mapping, "a dict")
    for key in found:
        instance(key, f"a key of {name}", str, "names as keys")
    return found


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
        meta = {"format": FORMAT, "page_size": PAGE_SIZE, **mapping(self.meta, "meta")}
        object.__setattr__(self, "meta", meta)
        _check_meta(meta)
        for name in ("t_ns", "indptr", "gfn"):
            own = np.array(as_array(getattr(self, name), name, TraceError), order="C")
            own.setflags(write=False)
            object.__setattr__(self, name, own)
        object.__setattr__(self, "npages", integer(self.npages, "npages", TraceError))
        _check_arrays(self.t_ns, self.indptr, self.gfn, self.npages)

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
        """Return a read-only view of the pages that epoch `index` wrote, ascending; EpochError unless 0 <= index < nepochs."""
        index = integer(index, "epoch", EpochError)
        if not 0 <= index < self.nepochs:
            raise EpochError(f"epoch={index} of a trace with {self.nepochs} epochs; they are counted from 0")
        return self.gfn[self.indptr[index] : self.indptr[index + 1]]


def _check_meta(meta: Mapping[str, Any]) -> None:
    if meta["format"] != FORMAT:
        raise TraceError(f"format is {spell(meta['format'])}; this reads {FORMAT!r}")
    if meta["page_size"] != PAGE_SIZE:
        raise TraceError(f"page_size is {spell(meta['page_size'])}; KVM logs pages of {PAGE_SIZE} bytes")


def _check_arrays(t_ns: Int64Array, indptr: Int64Array, gfn: GfnArray, npages: int) -> None:
    for name, array in (("t_ns", t_ns), ("indptr", indptr), ("gfn", gfn)):
        if array.dtype.str not in ARRAYS[name][0] or array.ndim != 1:
            wanted = " or ".join(np.dtype(kind).name for kind in ARRAYS[name][0])
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
