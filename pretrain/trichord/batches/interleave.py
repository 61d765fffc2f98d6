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

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from trichord.batches.packed_batch import IGNORE_INDEX, SLACK_SEGMENT, SPAN_AUDIO, SPAN_IMAGE, SPAN_TEXT


class StreamPart(NamedTuple):
    """A stretch of the stream. A tuple of small things: a plan is sent to other processes by the thousand.

    kind: SPAN_TEXT, SPAN_IMAGE or SPAN_AUDIO. length: tokens; 0 for an item that goes to its tower but not into the
    stream. ids: the tokens of text, else None. learned: text that the model has to predict. caption: the text that text
    towers and contrastive objectives see. grid: (gh, gw) of an image.
    """

    kind: int
    length: int
    ids: tuple[int, ...] | None = None
    learned: bool = False
    caption: bool = False
    grid: tuple[int, int] | None = None

    @staticmethod
    def text(ids: Iterable[int], learned: bool = False, caption: bool = False) -> StreamPart:
        tokens = tuple(ids)
        return StreamPart(SPAN_TEXT, len(tokens), tokens, learned, caption)

    @staticmethod
    def image(grid: tuple[int, int]) -> StreamPart:
        return StreamPart(SPAN_IMAGE, grid[0] * grid[1], grid=grid)

    @staticmethod
    def audio(tokens: int) -> StreamPart:
        return StreamPart(SPAN_AUDIO, tokens)


def segment_length(parts: Sequence[StreamPart]) -> int:
    return sum([part.length for part in parts])


def caption_span(parts: Sequence[StreamPart]) -> tuple[int, int]:
    """Where the caption lies; where there is none, empty behind [BOS]."""
    at = 0
    for part in parts:
        if part.caption:
            return at, at + part.length
        at += part.length
    return 1, 1


class StreamArrays:
    """A stretch of n tokens of the stream while it is filled; what no segment fills is slack, one causal run.

    input_ids, labels (n,) int64; positions (3, n) float32; segment_ids (n,) int32; span_kind (n,) int8; span_ends (n,)
    int32. Positions and span_ends count from the stretch's start, positions anew in each segment.
    """

    def __init__(self, length: int, pad_id: int, image_id: int, audio_id: int) -> None:
        self.input_ids = np.full(length, pad_id, dtype=np.int64)
        self.positions = np.zeros((3, length), dtype=np.float32)
        self.segment_ids = np.full(length, SLACK_SEGMENT, dtype=np.int32)
        self.span_kind = np.full(length, SPAN_TEXT, dtype=np.int8)
        self.span_ends = np.arange(1, length + 1, dtype=np.int32)
        self._learned = np.zeros(length, dtype=bool)  # tokens that the model has to predict
        self._count = np.arange(length, dtype=np.float32)
        self._placeholder = {SPAN_IMAGE: image_id, SPAN_AUDIO: audio_id}

    @property
    def labels(self) -> np.ndarray:
        """Of the whole stretch: the first token of a segment is never learned, so none crosses a border."""
        labels = np.full(len(self.input_ids), IGNORE_INDEX, dtype=np.int64)
        np.copyto(labels[:-1], self.input_ids[1:], where=self._learned[1:])
        return labels

    def write(self, start: int, parts: Sequence[StreamPart], segment: int) -> int:
        """Lay a segment's parts end to end from `start` on; returns where it ends."""
        at = start
        for part in parts:
            end = at + part.length
            if part.ids is not None:
                self.input_ids[at:end] = part.ids
                if part.learned:
                    self._learned[at:end] = True
            elif end > at:
                self.input_ids[at:end] = self._placeholder[part.kind]
                self.span_kind[at:end] = part.kind
                if part.kind == SPAN_IMAGE:
                    self.span_ends[at:end] = end
            at = end
        self.segment_ids[start:at] = segment
        self._write_positions(start, at, parts)
        return at

    def _write_positions(self, start: int, end: int, parts: Sequence[StreamPart]) -> None:
        """Text and audio advance by one on all axes. An image that starts at p holds time p, height p + row, width p +
        column; what follows it starts at p + max(gh, gw), so a picture takes as much of the range as its longer side.
        """
        following, run, at = 0, start, start
        for part in parts:
            if part.grid is not None and part.length:
                self.positions[:, run:at] = self._count[following : following + at - run]
                following += at - run
                rows, columns = part.grid
                run = at + part.length
                self.positions[0, at:run] = following
                self.positions[1, at:run] = following + np.repeat(np.arange(rows), columns)
                self.positions[2, at:run] = following + np.tile(np.arange(columns), rows)
                following += max(rows, columns)
            at += part.length
        self.positions[:, run:end] = self._count[following : following + end - run]
