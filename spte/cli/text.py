"""Plain columns and Markdown tables from cells, for verbs whose tables need no styles."""

from __future__ import annotations

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Return a line a row, two spaces between columns; the first `left` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    return ["  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)).rstrip() for row in rows]


def pipes(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Return the lines of a Markdown table whose head is the first row."""
    head, *body = rows
    rule = [":--" if i < left else "--:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
