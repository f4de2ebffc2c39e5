"""The picture of a trace: pages over time, dirty rate, working set, dirty pages against the length of an interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from spte._files import replacing
from spte.cli.params import spell_size, spell_time
from spte.cli.plot import BLUE, GREEN, GREY, ORANGE
from spte.platform import PAGE_SIZE
from spte.trace import Trace
from spte.trace.summary import WORKING_SET_S, Summary, epoch_of_write, previous_epoch, window_epochs, working_set

COLUMNS, ROWS = 480, 240
"""Most cells of the map of pages over time."""


def draw(trace: Trace, summary: Summary, path: Path) -> None:
    """Write the picture of `trace` to `path`; its suffix chooses the format."""
    fig = Figure(figsize=(11.0, 7.6), layout="constrained")
    command = trace.command if len(trace.command) <= 100 else trace.command[:97] + "..."
    size = f"{spell_size(trace.npages * PAGE_SIZE)}, {trace.nepochs} epochs, {summary.writes:,} page writes"
    fig.suptitle(f"{command}\n{size}", fontsize=10)
    panels = fig.subplot_mosaic([["map", "map"], ["rate", "length"], ["set", "length"]], height_ratios=[1.5, 1, 1])
    time, unit = _time(trace)
    _map(panels["map"], trace, time, unit)
    _rate(panels["rate"], trace, time)
    _set(panels["set"], trace, time, unit)
    _length(panels["length"], summary)
    panels["rate"].sharex(panels["set"])
    panels["rate"].tick_params(axis="x", labelbottom=False)
    with replacing(path) as stream:
        fig.savefig(stream, format=path.suffix[1:].lower(), dpi=120)


def _time(trace: Trace) -> tuple[npt.NDArray[np.float64], str]:
    """Return the bounds of the epochs and their unit: seconds, or epochs where the trace knows no time."""
    if trace.duration_ns:
        return (trace.t_ns - trace.t_ns[0]) / 1e9, "time, s"
    return np.arange(trace.nepochs + 1, dtype=np.float64), "epoch"


def _map(axes: Axes, trace: Trace, time: npt.NDArray[np.float64], unit: str) -> None:
    """Share of the pages of each stretch of memory that are dirty, over time."""
    columns, rows = min(COLUMNS, trace.nepochs), min(ROWS, trace.npages)
    epoch = epoch_of_write(trace)
    cell = epoch * columns // trace.nepochs * rows + trace.gfn.astype(np.int64) * rows // trace.npages
    count = np.bincount(cell, minlength=columns * rows).reshape(columns, rows)
    per_cell = np.bincount(np.arange(trace.nepochs) * columns // trace.nepochs, minlength=columns)[:, None] * trace.npages / rows
    share = np.ma.masked_equal(count / per_cell, 0).T
    least = 10.0 ** np.floor(np.log10(min(0.5, float(share.min())))) if share.count() else 0.1
    first = np.searchsorted(np.arange(trace.nepochs) * columns // trace.nepochs, np.arange(columns))
    edges = np.append(time[first], time[-1])
    memory = np.linspace(0, trace.npages * PAGE_SIZE, rows + 1)
    mesh = axes.pcolormesh(edges, memory, share, norm=LogNorm(least, 1.0), cmap="viridis", rasterized=True)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, format=FuncFormatter(lambda value, _: f"{value:.4g}"))
    bar.set_label("share of pages dirty", fontsize=8)
    axes.set(title="Pages over time", xlabel=unit, ylabel="address", xlim=(time[0], time[-1]), facecolor="#f4f4f4")
    _bytes_axis(axes)


def _rate(axes: Axes, trace: Trace, time: npt.NDArray[np.float64]) -> None:
    written = np.diff(trace.indptr) * PAGE_SIZE
    seconds = np.diff(trace.t_ns) / 1e9
    if trace.duration_ns:
        values = np.divide(written, seconds, out=np.zeros(len(written)), where=seconds > 0)
        mean, unit = written.sum() / seconds.sum(), "bytes/s"
    else:
        values, mean, unit = written.astype(np.float64), written.mean(), "bytes an epoch"
    axes.stairs(values, time, fill=True, color=BLUE)
    axes.axhline(mean, color=ORANGE, lw=1, label=f"mean {EngFormatter(places=0, sep=' ')(mean)}B" + ("/s" if trace.duration_ns else ""))
    axes.set(title="Dirty rate", ylabel=unit, ylim=(0, max(1.0, values.max()) * 1.3), xlim=(time[0], time[-1]))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.legend(fontsize=8, loc="upper left")


def _set(axes: Axes, trace: Trace, time: npt.NDArray[np.float64], unit: str) -> None:
    before = previous_epoch(trace)
    window = window_epochs(trace)
    length = spell_time(WORKING_SET_S) if trace.duration_ns > WORKING_SET_S * 1e9 else f"{window} epochs"
    total = np.cumsum(np.bincount(epoch_of_write(trace)[before < 0], minlength=trace.nepochs))
    axes.stairs(total * PAGE_SIZE, time, color=GREY, label="written so far", lw=1.5, baseline=None)
    last = working_set(trace, before, window)
    axes.stairs(last * PAGE_SIZE, time, color=GREEN, label=f"written in the last {length}", lw=1.5, baseline=None)
    axes.set(title="Working set", xlabel=unit, ylabel="distinct pages", ylim=0, xlim=(time[0], time[-1]))
    _bytes_axis(axes)
    axes.legend(fontsize=8, loc="lower right")


def _length(axes: Axes, summary: Summary) -> None:
    timed = summary.seconds > 0
    lengths = [i.seconds if timed else i.epochs for i in summary.intervals]
    pages = np.array([i.pages for i in summary.intervals])
    axes.plot(lengths, pages, "o-", color=BLUE, label="distinct pages dirtied")
    axes.plot(lengths, pages[0] / lengths[0] * np.array(lengths), ":", color=GREY, label="if no page were written twice")
    axes.axhline(summary.pages, color=ORANGE, lw=1, label="all of memory")
    axes.set(xscale="log", yscale="log", title="Dirty pages against interval length")
    axes.set(xlabel="interval" if timed else "epochs", ylabel="4 KiB pages")
    axes.set_ylim(max(0.5, min(pages.min(), summary.pages) * 0.7), summary.pages * 1.6)
    if timed:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: spell_time(seconds)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _bytes_axis(axes: Axes) -> None:
    """Mark the axis at multiples of a power of two."""
    top = max(axes.get_ylim()[1], 1.0)
    step = 1 << max(0, int(np.ceil(np.log2(top / 6))))
    axes.set_yticks(np.arange(0, top, step))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: spell_size(value) if value else "0"))
