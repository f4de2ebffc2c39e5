"""Pictures of migrations: rounds over time, and which combinations converge."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from spte._files import replacing
from spte.cli.migration.options import name_of, spelled
from spte.cli.migration.text import Axis, Figures, ns, short
from spte.cli.plot import BLUE, GREY, ORANGE
from spte.migrate.report import Outcome


def draw_rounds(outcome: Outcome, title: str, path: Path) -> None:
    """Write the picture of one migration to `path`: pages sent, dirtied and remaining, and below what slowed the guest down."""
    fig = Figure(figsize=(11.0, 6.2), layout="constrained")
    fig.suptitle(title, fontsize=9)
    panels = fig.subplot_mosaic([["pages"], ["guest"]], height_ratios=[2.4, 1], sharex=True)
    bounds = np.array([one.start_ns for one in outcome.rounds] + [outcome.rounds[-1].start_ns + outcome.rounds[-1].duration_ns]) / 1e9
    pages = panels["pages"]
    pages.stairs([one.sent for one in outcome.rounds], bounds, color=GREY, fill=True, alpha=0.5, label="sent in the round")
    pages.stairs([one.dirtied or 0 for one in outcome.rounds], bounds, color=ORANGE, linewidth=2, label="dirtied meanwhile")
    pages.plot(bounds[1:], [one.remaining for one in outcome.rounds], "o", color=BLUE, markersize=4, label="remaining at its end")
    pages.set(ylabel="4 KiB pages", ylim=0)
    pages.yaxis.set_major_formatter(EngFormatter(sep=" "))
    pages.legend(fontsize=8, loc="upper right")
    guest = panels["guest"]
    lengths = np.maximum(np.diff(bounds), 1e-12)
    if outcome.stall_ns is not None:
        stall = np.array([(one.stall_ns or 0) / 1e9 for one in outcome.rounds]) / lengths * 100
        guest.stairs(stall, bounds, color=ORANGE, label="stall, % of a vCPU, estimated")
    limits = [np.nan if one.dirty_limit is None else one.dirty_limit / 1e6 for one in outcome.rounds]
    if np.isfinite(limits).any():
        guest.stairs(limits, bounds, color=BLUE, linestyle="--", label="dirty limit of a vCPU, MB/s")
        guest.set(xlabel="time, s", ylabel="MB/s" if outcome.stall_ns is None else "%, MB/s", ylim=0, xlim=(0, bounds[-1]))
    else:
        guest.stairs([one.throttle_percent for one in outcome.rounds], bounds, color=BLUE, linestyle="--", label="throttle, %")
        guest.set(xlabel="time, s", ylabel="%", ylim=0, xlim=(0, bounds[-1]))
    guest.legend(fontsize=8, loc="upper left")
    with replacing(path) as stream:
        fig.savefig(stream, format=path.suffix[1:].lower(), dpi=120)


def draw_grid(axes: Sequence[Axis], figures: Sequence[Figures], title: str, path: Path) -> None:
    """Write the map of two axes to `path`: each cell says how it ended, and its shade how long it took."""
    (row_key, row_values), (key, values) = axes
    ended = np.array([one["total_ns"] / 1e9 if one["converged"] else np.nan for one in figures]).reshape(len(row_values), len(values))
    fig = Figure(figsize=(max(7.5, 2.4 + 1.7 * len(values)), 1.6 + 0.6 * len(row_values)), layout="constrained")
    fig.suptitle(textwrap.fill(title, 100, replace_whitespace=False), fontsize=8)
    plot = fig.add_subplot()
    plot.set_facecolor("white")
    if np.isfinite(ended).any():
        plot.imshow(np.log(ended), cmap="Blues", aspect="auto", alpha=0.4)
    for at, one in enumerate(figures):
        row, column = divmod(at, len(values))
        text = short(one) if one["converged"] else f"no\nafter {ns(one['total_ns'])}"
        plot.text(column, row, text, ha="center", va="center", fontsize=8, color="black" if one["converged"] else "#B00000")
    plot.set(
        xticks=range(len(values)), xticklabels=[spelled(key, value) for value in values], xlabel=name_of(key),
        yticks=range(len(row_values)), yticklabels=[spelled(row_key, value) for value in row_values], ylabel=name_of(row_key),
        xlim=(-0.5, len(values) - 0.5), ylim=(len(row_values) - 0.5, -0.5),
    )  # fmt: skip
    with replacing(path) as stream:
        fig.savefig(stream, format=path.suffix[1:].lower(), dpi=120)
