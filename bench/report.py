"""Turn the JSON of a benchmark run into a markdown table: ``python -m bench.report FILE [CHART.png] [PAGE.md]...``.

A page gets the full table, or ten rows of it, between the marks that it has; a chart shows the ten.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FULL, EXCERPT, END = "<!-- pytest bench -->", "<!-- pytest bench, ten rows -->", "<!-- end of pytest bench -->"
TEN = (
    "harvest, 100 % dirty", "harvest, 1 % dirty", "write-protect, arena order, ept-pml", "clear-dirty, arena order",
    "eager split, 2 MiB to 4 KiB", "recover in place", "PML drain, 2048 buffers", "random guest writes, W and D set",
    "random guest writes, PML logs each", "slow fault, first touch random",
)  # fmt: skip
HEAD = ("work", "ns", "per", "limit", "ns of limit", "ratio", "at most", "")


def figure_of(ns: float) -> str:
    """Return three digits of a small figure, and a large one without an exponent."""
    return f"{ns:,.0f}" if ns >= 1000 else f"{ns:.3g}"


def row(info: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of one benchmark."""
    ns = figure_of(info["ns_per_unit"])
    if "ratio" not in info:
        return info["name"], ns, info["unit"], "", "", "", "", ""
    bar = "" if info["at_most"] is None else f"{info['at_most']:g}x"
    verdict = {True: "met", False: "missed", None: ""}[info["met"]]
    if info["met"] is False and info["why"]:
        verdict += f": {info['why']}"
    return info["name"], ns, info["unit"], info["limit"], figure_of(info["limit_ns_per_unit"]), f"{info['ratio']:.2f}x", bar, verdict


def figures_of(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of the benchmarks that carry any."""
    return [b["extra_info"] for b in benchmarks if b["extra_info"]]


def excerpt(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of `TEN`, in that order, without the reasons."""
    by_name = {info["name"]: info for info in infos}
    return [by_name[name] | {"why": ""} for name in TEN if name in by_name]


def table(infos: list[dict[str, Any]]) -> str:
    """Return the markdown table of `infos`."""
    rows = [HEAD, tuple(":--" if i in (0, 3) else "--:" for i in range(len(HEAD))), *map(row, infos)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)


def draw(infos: list[dict[str, Any]], path: Path) -> None:
    """Draw each ratio beside its bar, on a logarithmic axis on which 1 is the limit."""
    from matplotlib.figure import Figure

    infos = [info for info in infos if "ratio" in info][::-1]
    figure = Figure(figsize=(8, 0.32 * len(infos) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {True: "tab:green", False: "tab:red", None: "tab:gray"}
    axes.barh(range(len(infos)), [i["ratio"] for i in infos], color=[colors[i["met"]] for i in infos], height=0.7)
    for y, info in enumerate(infos):
        if info["at_most"] is not None:
            axes.plot([info["at_most"]] * 2, [y - 0.4, y + 0.4], color="black")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="black", linestyle=":")
    axes.set_yticks(range(len(infos)), [i["name"] for i in infos])
    axes.set_xlabel("time over the limit's; black stroke: at most")
    figure.savefig(path)


def put_into(page: Path, infos: list[dict[str, Any]]) -> None:
    """Replace what stands between the marks of `page`; ValueError if they are not there."""
    text = page.read_text()
    mark, shown = (EXCERPT, excerpt(infos)) if EXCERPT in text else (FULL, infos)
    before, start, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page} has no {FULL} or {EXCERPT} ... {END}")
    page.write_text(f"{before}{mark}\n{table(shown)}\n{END}{after}")


def main(argv: list[str]) -> int:
    """Print the table; exit code 2 with one line if the file is not a benchmark run, 4 without matplotlib."""
    if not argv or not all(name.endswith((".png", ".svg", ".md")) for name in argv[1:]):
        print("usage: python -m bench.report FILE [CHART.png] [PAGE.md]..., FILE from pytest bench --benchmark-json=FILE", file=sys.stderr)
        return 2
    try:
        infos = figures_of(json.loads(Path(argv[0]).read_text())["benchmarks"])
        print(table(infos))
        for name in argv[1:]:
            if name.endswith(".md"):
                put_into(Path(name), infos)
            else:
                draw(excerpt(infos), Path(name))
    except ModuleNotFoundError as error:
        print(f"the chart needs {error.name}; pip install 'kvm-spte[cli]'", file=sys.stderr)
        return 4
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{argv[0]}: not the JSON of a benchmark run ({error}); make one with --benchmark-json", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
