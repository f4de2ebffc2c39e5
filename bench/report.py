"""Turn the JSON of a benchmark run into a markdown table: ``python -m bench.report FILE [CHART.png] [README.md]``.

If asked, also into a chart, and into the table between the marks of a README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

START, END = "<!-- pytest bench -->", "<!-- end of pytest bench -->"
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


def table(benchmarks: list[dict[str, Any]]) -> str:
    """Return the markdown table of the benchmarks that carry figures."""
    rows = [HEAD, tuple(":--" if i in (0, 3) else "--:" for i in range(len(HEAD)))]
    rows += [row(b["extra_info"]) for b in benchmarks if b["extra_info"]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)


def draw(benchmarks: list[dict[str, Any]], path: Path) -> None:
    """Draw each ratio beside its bar, on a logarithmic axis on which 1 is the limit."""
    from matplotlib.figure import Figure

    infos = [b["extra_info"] for b in benchmarks if "ratio" in b["extra_info"]][::-1]
    figure = Figure(figsize=(8, 0.32 * len(infos) + 1.2), layout="constrained")
    axes = figure.subplots()
    colors = {True: "tab:green", False: "tab:red", None: "tab:gray"}
    axes.barh(range(len(infos)), [i["ratio"] for i in infos], color=[colors[i["met"]] for i in infos], height=0.7)
    for y, info in enumerate(infos):
        if info["at_most"] is not None:
            axes.plot([info["at_most"]] * 2, [y - 0.4, y + 0.4], color="black")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linestyle=":")
    axes.set_yticks(range(len(infos)), [i["name"] for i in infos])
    axes.set_xlabel("time over the limit's; black stroke: at most")
    figure.savefig(path)


def put_into(readme: Path, text: str) -> None:
    """Replace what stands between the marks of `readme`; ValueError if they are not there."""
    before, start, rest = readme.read_text().partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{readme} has no {START} ... {END}")
    readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


def main(argv: list[str]) -> int:
    """Print the table; exit code 2 with one line if the file is not a benchmark run, 4 without matplotlib."""
    if not argv or not all(name.endswith((".png", ".svg", ".md")) for name in argv[1:]):
        print("usage: python -m bench.report FILE [CHART.png] [README.md], FILE from pytest bench --benchmark-json=FILE", file=sys.stderr)
        return 2
    try:
        benchmarks = json.loads(Path(argv[0]).read_text())["benchmarks"]
        print(table(benchmarks))
        for name in argv[1:]:
            if name.endswith(".md"):
                put_into(Path(name), table(benchmarks))
            else:
                draw(benchmarks, Path(name))
    except ModuleNotFoundError as error:
        print(f"the chart needs {error.name}; pip install 'kvm-spte[cli]'", file=sys.stderr)
        return 4
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{argv[0]}: not the JSON of a benchmark run ({error}); make one with --benchmark-json", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
