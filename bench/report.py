"""Turn the JSON of a benchmark run into a markdown table: ``python -m bench.report FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = ("work", "ns", "per", "limit", "ns of limit", "ratio", "at most", "")


def row(info: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of one benchmark."""
    ns = f"{info['ns_per_unit']:.3g}"
    if "ratio" not in info:
        return info["name"], ns, info["unit"], "", "", "", "", ""
    bar = "" if info["at_most"] is None else f"{info['at_most']:g}x"
    verdict = {True: "met", False: "missed", None: ""}[info["met"]]
    return info["name"], ns, info["unit"], info["limit"], f"{info['limit_ns_per_unit']:.3g}", f"{info['ratio']:.2f}x", bar, verdict


def table(benchmarks: list[dict[str, Any]]) -> str:
    """Return the markdown table of the benchmarks that carry figures."""
    rows = [HEAD, tuple(":--" if i in (0, 3) else "--:" for i in range(len(HEAD)))]
    rows += [row(b["extra_info"]) for b in benchmarks if b["extra_info"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def main(argv: list[str]) -> int:
    """Print the table; exit code 2 with one line if the file is not a benchmark run."""
    if len(argv) != 1:
        print("usage: python -m bench.report FILE, made by pytest bench --benchmark-json=FILE", file=sys.stderr)
        return 2
    try:
        benchmarks = json.loads(Path(argv[0]).read_text())["benchmarks"]
        print(table(benchmarks))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{argv[0]}: not the JSON of a benchmark run ({error}); make one with --benchmark-json", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
