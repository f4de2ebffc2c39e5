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
GIB = 1 << 30


def figure_of(ns: float) -> str:
    """Return three digits of a small figure, and a large one without an exponent."""
    return f"{ns:,.0f}" if ns >= 1000 else f"{ns:.3g}"


def size_of(size: int) -> str:
    """Return bytes as people name the memory of a guest."""
    return f"{size >> 40} TiB" if size >= 1 << 40 else f"{size >> 30} GiB" if size >= GIB else f"{size >> 20} MiB"


def figures_of(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of the benchmarks that carry any."""
    return [b["extra_info"] for b in benchmarks if b["extra_info"]]


def sizes_in(infos: list[dict[str, Any]]) -> list[int]:
    """Return the guests' bytes, ascending."""
    return sorted({info["guest"] for info in infos if "guest" in info})


def by_work(infos: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the figures of each kernel by guest size, in the order of the run."""
    works: dict[str, dict[int, dict[str, Any]]] = {}
    for info in infos:
        if "guest" in info:
            works.setdefault(info["name"], {})[info["guest"]] = info
    return works


def excerpt(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of `TEN`, in that order."""
    works = by_work(infos)
    return [info for name in TEN for info in works.get(name, {}).values()]


def cell(info: dict[str, Any] | None) -> str:
    """Return what a kernel took a unit, over its limit, and whether it is more than it should be."""
    if info is None:
        return ""
    missed = " missed" if info["met"] is False else ""
    return f"{figure_of(info['ns_per_unit'])} ns, {info['ratio']:.2f}x{missed}"


def _markdown(rows: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    ruler = tuple(":--" if i in left else "--:" for i in range(len(rows[0])))
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in (rows[0], ruler, *rows[1:]))


def bar_of(info: dict[str, Any]) -> str:
    """Return the ratio that a kernel should keep."""
    return "" if info["at_most"] is None else f"{info['at_most']:g}x"


def table(infos: list[dict[str, Any]]) -> str:
    """Return the markdown table of the kernels, a column a guest size."""
    sizes = sizes_in(infos)
    rows: list[tuple[str, ...]] = [("work", "per", "limit", "at most", *map(size_of, sizes))]
    for name, found in by_work(infos).items():
        first = next(iter(found.values()))
        rows.append((name, first["unit"], first["limit"], bar_of(first), *(cell(found.get(size)) for size in sizes)))
    return _markdown(rows, (0, 2))


def time_of(ns: float) -> str:
    """Return a time in the unit that people read it in."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= 0.1 * size:
            return f"{ns / size:.3g} {unit}"
    return f"{ns:.3g} ns"


def starts(infos: list[dict[str, Any]]) -> str:
    """Return the markdown table of what a call and a fresh process take."""
    rows: list[tuple[str, ...]] = [("a call, a fresh process", "time", "at most", "")]
    for info in infos:
        if "guest" not in info:
            verdict = {True: "met", False: f"missed: {info.get('why', '')}".rstrip(": "), None: ""}[info.get("met")]
            rows.append((info["name"], time_of(info["ns_per_unit"]), info.get("limit", ""), verdict))
    return _markdown(rows, (0,))


def missed(infos: list[dict[str, Any]]) -> str:
    """Return a line for each kernel that missed its ratio: at which sizes, and why."""
    lines: dict[tuple[str, str], list[str]] = {}
    for info in sorted((info for info in infos if "guest" in info), key=lambda info: info["guest"]):
        if info["met"] is False:
            lines.setdefault((info["name"], info["why"]), []).append(size_of(info["guest"]))
    return "\n".join(f"- {name}, {', '.join(sizes)}" + (f": {why}." if why else ".") for (name, why), sizes in lines.items())


def page_of(infos: list[dict[str, Any]]) -> str:
    """Return all that is known: the kernels, the reasons of those that missed, and the fresh process."""
    parts = [table(infos)]
    if lines := missed(infos):
        parts.append("Missed, and why:\n\n" + lines)
    if any("guest" not in info for info in infos):
        parts.append(starts(infos))
    return "\n\n".join(parts)


def draw(infos: list[dict[str, Any]], path: Path) -> None:
    """Draw each ratio beside its bar, a shade a guest size, on a logarithmic axis on which 1 is the limit."""
    from matplotlib.figure import Figure

    works, sizes = list(by_work(infos).items())[::-1], sizes_in(infos)
    height = 0.8 / max(len(sizes), 1)
    figure = Figure(figsize=(8, 0.62 * len(works) + 1.2), layout="constrained")
    axes = figure.subplots()
    for n, size in enumerate(sizes):
        have = [(y, found[size]["ratio"]) for y, (_, found) in enumerate(works) if size in found]
        places = [y + 0.4 - height * (n + 0.5) for y, _ in have]
        shade = 0.8 - 0.7 * n / max(len(sizes) - 1, 1)
        axes.barh(places, [ratio for _, ratio in have], height * 0.9, color=(shade * 0.6, shade * 0.8, shade), label=size_of(size))
    for y, (_, found) in enumerate(works):
        at_most = next(iter(found.values()))["at_most"]
        if at_most is not None:
            axes.plot([at_most] * 2, [y - 0.42, y + 0.42], color="tab:red")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="black", linestyle=":")
    axes.set_yticks(range(len(works)), [name for name, _ in works])
    axes.set_xlabel("time over the limit's; red stroke: at most")
    axes.legend(title="guest")
    figure.savefig(path)


def put_into(page: Path, infos: list[dict[str, Any]]) -> None:
    """Replace what stands between the marks of `page`; ValueError if they are not there."""
    text = page.read_text()
    mark, shown = (EXCERPT, table(excerpt(infos))) if EXCERPT in text else (FULL, page_of(infos))
    before, start, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page} has no {FULL} or {EXCERPT} ... {END}")
    page.write_text(f"{before}{mark}\n{shown}\n{END}{after}")


def main(argv: list[str]) -> int:
    """Print the table; exit code 2 with one line if the file is not a benchmark run, 4 without matplotlib."""
    if not argv or not all(name.endswith((".png", ".svg", ".md")) for name in argv[1:]):
        print("usage: python -m bench.report FILE [CHART.png] [PAGE.md]..., FILE from pytest bench --benchmark-json=FILE", file=sys.stderr)
        return 2
    try:
        infos = figures_of(json.loads(Path(argv[0]).read_text())["benchmarks"])
        print(page_of(infos))
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
