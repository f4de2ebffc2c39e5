"""What recording costs on this machine, as a Markdown table: ``python -m bench.record_overhead [docs/record.md]``."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from spte.record.errors import MissingPieceError
from spte.record.measure import Costs, measure

START, END = "<!-- python -m bench.record_overhead -->", "<!-- end -->"
NPAGES, ROUNDS = 1 << 18, 7
NAMES = {
    "first_write": "first write of an epoch to a page: the fault",
    "later_write": "any later write to it",
    "scan_idle": "scan, a page in memory that was not written",
    "scan_written": "scan, a page that was written",
}


def table(costs: Costs) -> str:
    """Return the costs as a Markdown table."""
    rows = [f"| {name} | {getattr(costs, field):.1f} |" for field, name in NAMES.items()]
    head = f"| Linux {platform.release().partition('-')[0]}, least of {ROUNDS} rounds over {NPAGES * 4096 >> 20} MiB | ns a page |"
    return "\n".join([head, "| :-- | --: |", *rows])


def main(argv: list[str]) -> int:
    """Measure, print, and put the table between the marks of a file if one is given."""
    try:
        text = table(measure(NPAGES, ROUNDS))
    except MissingPieceError as error:
        print(error, file=sys.stderr)
        return 4
    print(text)
    for path in map(Path, argv):
        before, _, rest = path.read_text().partition(START)
        _, end, after = rest.partition(END)
        if not end:
            print(f"{path}: has no {START} with {END} behind it", file=sys.stderr)
            return 2
        path.write_text(f"{before}{START}\n{text}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
