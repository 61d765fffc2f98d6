"""How samples fit rows: packing by length or by count, and splitting what is longer than a row. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import SPAN_TEXT


def pack_rows(
    lengths: Sequence[int], row_tokens: int, max_samples_per_row: int, num_waiting: int = 0
) -> list[list[int]]:
    """Distribute items over rows of at most `row_tokens` tokens and `max_samples_per_row` items.

    Longest first (ties: the earlier item); each goes into the row that it leaves the least room in (ties: the earlier
    row), a new row where none has room. Johnson et al. 1974 bound the result by 11/9 of the optimum. The first
    `num_waiting` items are placed before all others, so that the row left over at the end has none of them.

    Returns:
        Rows of item numbers, each row in the order of the items, rows in the order they were opened.

    Raises:
        ValueError: an item does not fit an empty row; the caller leaves such items out and says so.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row number) of rows that may still take an item, ascending
    for item in sorted(range(len(lengths)), key=lambda i: (i >= num_waiting, -lengths[i], i)):
        length = lengths[item]
        _check_fits(item, length, row_tokens)
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


def group_rows(lengths: Sequence[int], row_tokens: int, samples_per_row: int) -> list[list[int]]:
    """Rows of `samples_per_row` items of similar length (length bucketing inside the window), shortest first.

    A row is closed early where its tokens would pass `row_tokens`. Each row is in the order of the items.

    Raises:
        ValueError: an item does not fit an empty row.
    """
    rows: list[list[int]] = []
    free = 0
    for item in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        length = lengths[item]
        _check_fits(item, length, row_tokens)
        if not rows or length > free or len(rows[-1]) == samples_per_row:
            rows.append([])
            free = row_tokens
        rows[-1].append(item)
        free -= length
    return [sorted(row) for row in rows]


def split_parts(parts: Sequence[StreamPart], row_tokens: int, bos_id: int) -> list[list[StreamPart]] | None:
    """Cut a segment into pieces of at most `row_tokens` tokens, at token borders of its text; None: an image or clip
    alone is longer than a row.

    A further piece opens with the text token before it, as context that is not learned again, or with [BOS] behind an
    item: so every learned token is learned once, and predicted from something. No piece has a caption: a part of a
    text is not the text.
    """
    pieces: list[list[StreamPart]] = [[]]
    free = row_tokens
    opening = bos_id
    for part in parts:
        rest = part._replace(caption=False)
        while rest.length > free:
            if rest.kind != SPAN_TEXT and rest.length > row_tokens - 1:
                return None
            if rest.ids is not None and free > 0:
                pieces[-1].append(_text_slice(rest, 0, free))
                opening = rest.ids[free - 1]
                rest = _text_slice(rest, free, rest.length)
            pieces.append([StreamPart.text([opening])])
            free = row_tokens - 1
        pieces[-1].append(rest)
        free -= rest.length
        if rest.length:
            opening = bos_id if rest.ids is None else rest.ids[-1]
    return pieces


def _text_slice(part: StreamPart, start: int, end: int) -> StreamPart:
    assert part.ids is not None
    return part._replace(ids=part.ids[start:end], length=end - start)


def _check_fits(item: int, length: int, row_tokens: int) -> None:
    if not 0 < length <= row_tokens:
        raise ValueError(f"item {item} has {length} tokens, a row takes 1 to {row_tokens}; leave it out before packing")
