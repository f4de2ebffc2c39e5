"""Which pages a trace writes when, as a figure."""

from __future__ import annotations

import numpy as np

from spte.cli.html.page import Section, figure
from spte.platform import PAGE_SIZE
from spte.trace import Trace
from spte.trace.summary import epoch_of_write

COLUMNS, ROWS = 240, 160
"""Most cells of the map."""


def pages_over_time(trace: Trace) -> Section:
    """Return the map of a trace: what share of each stretch of memory is written in each stretch of time."""
    columns, rows = min(COLUMNS, trace.nepochs), min(ROWS, trace.npages // 512)
    column = epoch_of_write(trace) * columns // trace.nepochs
    row = trace.gfn.astype(np.int64) * rows // trace.npages
    written = np.bincount(row * columns + column, minlength=rows * columns).reshape(rows, columns)
    share = written / (trace.npages / rows) / (trace.nepochs / columns)
    seconds = np.linspace(0, trace.duration_ns / 1e9, columns + 1) if trace.duration_ns else np.arange(columns + 1)
    middles = (seconds[1:] + seconds[:-1]) / 2
    mib = (np.arange(rows) + 0.5) * trace.npages * PAGE_SIZE / rows / 2**20
    shown = figure("time, s" if trace.duration_ns else "epoch", "address, MiB")
    shown.add_heatmap(
        x=middles.round(6).tolist(), y=mib.round(3).tolist(), z=np.where(written > 0, np.round(share * 100, 3), np.nan).tolist(),
        colorscale="Greys", zmin=0,
        colorbar={"title": {"text": "% of pages,<br>each epoch"}}, hovertemplate="%{x} s, %{y} MiB: %{z} %<extra></extra>",
    )  # fmt: skip
    return Section("Pages over time", "What the guest writes when nothing slows it down: the darker, the more of the pages there.", shown)
