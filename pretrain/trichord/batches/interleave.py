"""How one sample becomes one segment of the token stream: parts in reading order, each text, image or audio.

    fields:    [BOS]  image tokens (row by row)  audio tokens  prompt  text  [EOS]
    document:  [BOS]  text  image tokens  text  ...  [EOS]
    chat:      [BOS]  prefix text ...  prefix text [EOS]  prefix text ...      an end behind each assistant turn

[EOS] is there exactly where text to be learned ends, so a sample without text teaches nothing about endings. Labels are
shifted: `labels[t]` is the token at t + 1, and is set only where that token is to be learned. Plain numpy, so that
generation can build the same prompt with the same positions.

Legend: n tokens of the segment; gh, gw image token rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trichord.batches.packed_batch import IGNORE_INDEX, SPAN_AUDIO, SPAN_IMAGE, SPAN_TEXT


@dataclass(frozen=True)
class StreamPart:
    """A stretch of the stream.

    kind: SPAN_TEXT, SPAN_IMAGE or SPAN_AUDIO. length: tokens; 0 for an item that goes to its tower but not into the
    stream. ids (length,) int32 of text, else None. learned: text that the model has to predict. caption: the text that
    text towers and contrastive objectives see. grid: (gh, gw) of an image.
    """

    kind: int
    length: int
    ids: np.ndarray | None = None
    learned: bool = False
    caption: bool = False
    grid: tuple[int, int] | None = None

    @staticmethod
    def text(ids: Sequence[int] | np.ndarray, learned: bool = False, caption: bool = False) -> StreamPart:
        array = np.asarray(ids, dtype=np.int32)
        return StreamPart(SPAN_TEXT, len(array), array, learned, caption)

    @staticmethod
    def image(grid: tuple[int, int]) -> StreamPart:
        return StreamPart(SPAN_IMAGE, grid[0] * grid[1], grid=grid)

    @staticmethod
    def audio(tokens: int) -> StreamPart:
        return StreamPart(SPAN_AUDIO, tokens)


@dataclass(frozen=True)
class SegmentArrays:
    """One segment, filled in: input_ids, labels (n,) int64; positions (3, n) float32; span_kind (n,) int8;
    span_ends (n,) int32, counted from the segment's start."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    span_kind: np.ndarray
    span_ends: np.ndarray


def segment_length(parts: Sequence[StreamPart]) -> int:
    return sum(part.length for part in parts)


def part_spans(parts: Sequence[StreamPart]) -> list[tuple[int, int]]:
    """(start, end) of each part, counted from the segment's start."""
    spans, end = [], 0
    for part in parts:
        spans.append((end, end + part.length))
        end += part.length
    return spans


def caption_span(parts: Sequence[StreamPart]) -> tuple[int, int]:
    """Where the caption lies; where there is none, empty behind [BOS]."""
    return next((span for part, span in zip(parts, part_spans(parts)) if part.caption), (1, 1))


def segment_positions(parts: Sequence[StreamPart]) -> np.ndarray:
    """Positions (3, n) float32 on the axes time, height, width.

    Text and audio advance by one on all axes. An image that starts at p holds time p, height p + row, width p + column;
    what follows it starts at p + max(gh, gw), so a picture takes as much of the position range as its longer side.
    """
    positions = np.empty((3, segment_length(parts)), dtype=np.float32)
    following = 0
    for part, (start, end) in zip(parts, part_spans(parts)):
        if part.kind == SPAN_IMAGE and part.grid and end > start:
            rows, columns = part.grid
            positions[0, start:end] = following
            positions[1, start:end] = following + np.repeat(np.arange(rows), columns)
            positions[2, start:end] = following + np.tile(np.arange(columns), rows)
            following += max(rows, columns)
        else:
            positions[:, start:end] = np.arange(following, following + end - start, dtype=np.float32)
            following += end - start
    return positions


def fill_segment(parts: Sequence[StreamPart], *, image_id: int, audio_id: int) -> SegmentArrays:
    """Token ids, labels, positions and spans of one segment."""
    length = segment_length(parts)
    input_ids = np.empty(length, dtype=np.int64)
    learned = np.zeros(length, dtype=bool)  # tokens that the model has to predict
    span_kind = np.empty(length, dtype=np.int8)
    span_ends = np.arange(1, length + 1, dtype=np.int32)
    placeholder = {SPAN_IMAGE: image_id, SPAN_AUDIO: audio_id}
    for part, (start, end) in zip(parts, part_spans(parts)):
        input_ids[start:end] = placeholder[part.kind] if part.ids is None else part.ids
        learned[start:end] = part.learned
        span_kind[start:end] = part.kind
        if part.kind == SPAN_IMAGE:
            span_ends[start:end] = end
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    labels[:-1][learned[1:]] = input_ids[1:][learned[1:]]
    return SegmentArrays(input_ids, labels, segment_positions(parts), span_kind, span_ends)
