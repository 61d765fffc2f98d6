"""Sizes, times and tables as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from trichord.planning.memory import GIB

_DURATIONS = ((86_400.0, "days"), (3_600.0, "h"), (60.0, "min"))


def size_text(size: float) -> str:
    """Bytes, in the largest binary unit up to GiB that leaves at least 1."""
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} GiB" if unit == GIB else f"{size / unit:.1f} {name}"
    return f"{size:.0f} B" if size else "0"


def seconds_text(seconds: float) -> str:
    """Three digits, in s, ms or us."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    unit, name = next(((u, n) for u, n in ((1.0, "s"), (1e-3, "ms")) if seconds >= u), (1e-6, "us"))
    return f"{seconds / unit:#.3g}".rstrip(".") + f" {name}" if seconds else "0"


def duration_text(seconds: float) -> str:
    """Of a run: in days, hours or minutes where there is at least one of them."""
    for unit, name in _DURATIONS:
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return seconds_text(seconds)


def amount_text(amount: float) -> str:
    """Of hours or of money: whole where it is large, two digits where it is small."""
    if amount >= 100:
        return f"{amount:,.0f}"
    return f"{amount:.2g}" if amount >= 0.01 else "under 0.01"


def count_text(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def table(rows: Sequence[Sequence[str]], width: int | None, left: int = 0) -> list[str]:
    """Lines of equal columns, right-aligned but for the first `left`, indented by two; closer together where two spaces
    between them do not go into `width` characters. Columns that hold nothing but their title are left out."""
    columns = [column for column in zip(*rows) if any(column[1:])]
    sizes = [max(map(len, column)) for column in columns]
    gap = "  " if width is None or 2 + sum(sizes) + 2 * (len(sizes) - 1) <= width else " "
    cells = [
        [cell.ljust(size) if number < left else cell.rjust(size) for cell in column]
        for number, (column, size) in enumerate(zip(columns, sizes))
    ]
    return [("  " + gap.join(row)).rstrip() for row in zip(*cells)]


def wrapped(line: str, width: int | None) -> str:
    """A line that is too long, broken between words and indented deeper than it began."""
    if width is None or len(line) <= width:
        return line
    indent = " " * (len(line) - len(line.lstrip(" ")) + 4)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
