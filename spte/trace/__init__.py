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

from spte.trace.build import from_bitmaps, from_gfns
from spte.trace.model import FORMAT, MAX_BYTES, MAX_NPAGES, PAGES_PER_2M, Trace, TraceError
from spte.trace.npz import SHIPPED, default_trace, load, named, save, shipped

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "MAX_NPAGES",
    "PAGES_PER_2M",
    "SHIPPED",
    "Trace",
    "TraceError",
    "default_trace",
    "from_bitmaps",
    "from_gfns",
    "load",
    "named",
    "save",
    "shipped",
]
