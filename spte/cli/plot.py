"""The picture of a profile: pages dirtied over time, and what each platform paid for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from spte._files import replacing
from spte.profile.columns import labels
from spte.profile.report import HARVEST, Row

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#999999", "#CC79A7"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write the picture of `rows` to `path`; its suffix chooses the format."""
    bars = 0.32 * len(rows)
    fig = plt.figure(figsize=(11.0, 5.0 + bars), layout="constrained")
    try:
        fig.suptitle(title, fontsize=10)
        panels = fig.subplot_mosaic([["top", "top"], ["left", "right"]], height_ratios=[2.6, 1.2 + bars])
        _epochs(panels["top"], rows[0])
        _stacks(panels["left"], _names(rows), "VM exits while logging", "exits", _exits(rows))
        _stacks(panels["right"], _names(rows), "SPTEs written", "SPTEs", _sptes(rows))
        panels["right"].tick_params(axis="y", labelleft=False)
        with replacing(path) as stream:
            fig.savefig(stream, format=path.suffix[1:].lower(), dpi=120)
    finally:
        plt.close(fig)


def _epochs(axes: Axes, row: Row) -> None:
    written = [epoch.written for epoch in row.epochs]
    if row.t_ns is None or row.t_ns[-1] == row.t_ns[0]:
        bounds, unit = np.arange(len(written) + 1) + 0.5, "iteration"
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        bounds, unit = row.t_ns * 1e-9, "time, s"
    axes.stairs(written, bounds, fill=True, color=BLUE)
    axes.set(title="Pages written in each epoch", xlabel=unit, ylabel="4 KiB pages", xlim=(bounds[0], bounds[-1]), ylim=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))


def _exits(rows: Sequence[Row]) -> dict[str, tuple[str, list[int]]]:
    parts = {
        "slow fault": (ORANGE, [row.count("faults_slow") for row in rows]),
        "fast fault": (BLUE, [row.count("faults_fast") for row in rows]),
        "PML full": (GREEN, [row.count("pml_full") for row in rows]),
    }
    known = np.sum([values for _, values in parts.values()], axis=0)
    other = [max(0, row.count("exits") - int(k)) for row, k in zip(rows, known, strict=True)]
    return {**parts, "other": (GREY, other)}


def _sptes(rows: Sequence[Row]) -> dict[str, tuple[str, list[int]]]:
    return {
        "enable": (PURPLE, [row.count("sptes_written", "enable") for row in rows]),
        "faults": (ORANGE, [row.count("sptes_written", "dirty") for row in rows]),
        "harvest": (BLUE, [row.count("sptes_written", *HARVEST) for row in rows]),
        "disable": (GREY, [row.count("sptes_written", "disable") for row in rows]),
    }


def _stacks(axes: Axes, names: Sequence[str], title: str, unit: str, parts: dict[str, tuple[str, list[int]]]) -> None:
    places = np.arange(len(names))
    base = np.zeros(len(names), np.int64)
    for label, (color, values) in parts.items():
        if any(values):
            axes.barh(places, values, left=base, label=label, color=color, height=0.7)
            base += values
    for y, total in enumerate(base):
        axes.annotate(f"{total:,}", (total, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(title=title, xlabel=unit, xlim=(0, max(1.0, float(base.max())) * 1.22), yticks=places, yticklabels=names)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if base.any():
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.55 / (1.2 + 0.32 * len(names))))


def _names(rows: Sequence[Row]) -> list[str]:
    return ["  ".join(label) for label in labels([row.column for row in rows])]
