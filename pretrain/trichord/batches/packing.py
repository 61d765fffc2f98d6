"""Best-fit-decreasing packing of lengths into rows; a pure function of the lengths and their order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], row_tokens: int, max_samples_per_row: int) -> list[list[int]]:
    """Distribute items over rows of at most `row_tokens` tokens and `max_samples_per_row` items.

    Longest first (ties: the earlier item); each goes into the row that it leaves the least room in (ties: the earlier
    row), a new row where none has room. Johnson et al. 1974 bound the result by 11/9 of the optimum.

    Returns:
        Rows of item numbers, each row in the order of the items, rows in the order they were opened.

    Raises:
        ValueError: an item does not fit an empty row; the caller leaves such items out and says so.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row number) of rows that may still take an item, ascending
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        if not 0 < length <= row_tokens:
            raise ValueError(
                f"item {item} has {length} tokens, a row takes 1 to {row_tokens}; leave it out before packing"
            )
        found = bisect_left(open_rows, (length, -1))
        if found < len(open_rows):
            free, row = open_rows.pop(found)
        else:
            free, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(item)
        if free > length and len(rows[row]) < max_samples_per_row:
            insort(open_rows, (free - length, row))
    return [sorted(row) for row in rows]
