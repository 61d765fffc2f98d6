"""How one sample becomes one segment of the token stream.

    [BOS]  image tokens (row by row)  audio tokens  prompt tokens  text tokens  [EOS]

Each part may be absent; [EOS] is there exactly where text is, so a sample without text teaches nothing about endings.
Labels are shifted: `labels[t]` is the token at t + 1, and is set only where that token is text or [EOS] (or prompt, if
asked). Plain numpy, so that generation can build the same prompt with the same positions.

Legend: n tokens of the segment; gh, gw image token rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trichord.batches.packed_batch import IGNORE_INDEX, SPAN_AUDIO, SPAN_IMAGE, SPAN_TEXT


@dataclass(frozen=True)
class SegmentLayout:
    """Where each part of one segment lies; spans are (start, end) inside the segment, empty where a part is absent.

    grid: rows and columns of image tokens, None without an image. has_text: whether text and [EOS] are there.
    """

    grid: tuple[int, int] | None
    image: tuple[int, int]
    audio: tuple[int, int]
    prompt: tuple[int, int]
    text: tuple[int, int]
    has_text: bool
    length: int


@dataclass(frozen=True)
class SegmentArrays:
    """One segment, filled in: input_ids, labels (n,) int64; positions (3, n) float32; span_kind (n,) int8;
    span_ends (n,) int32, counted from the segment's start."""

    input_ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    span_kind: np.ndarray
    span_ends: np.ndarray


def plan_segment(
    grid: tuple[int, int] | None, audio_tokens: int | None, prompt_tokens: int, text_tokens: int | None
) -> SegmentLayout:
    """Lay out one sample from its lengths alone; None marks an absent image, clip or text."""
    spans: list[tuple[int, int]] = []
    end = 1  # after [BOS]
    for count in (grid[0] * grid[1] if grid else 0, audio_tokens or 0, prompt_tokens, text_tokens or 0):
        spans.append((end, end + count))
        end += count
    has_text = text_tokens is not None
    return SegmentLayout(grid, *spans, has_text=has_text, length=end + int(has_text))


def segment_positions(layout: SegmentLayout) -> np.ndarray:
    """Positions (3, n) float32 on the axes time, height, width.

    Text and audio advance by one on all axes. An image that starts at p holds time p, height p + row, width p + column;
    what follows it starts at p + max(gh, gw), so a picture takes as much of the position range as its longer side.
    """
    positions = np.empty((3, layout.length), dtype=np.float32)
    start, end = layout.image
    positions[:, :start] = np.arange(start, dtype=np.float32)
    following = start
    if layout.grid and end > start:
        rows, columns = layout.grid
        positions[0, start:end] = start
        positions[1, start:end] = start + np.repeat(np.arange(rows), columns)
        positions[2, start:end] = start + np.tile(np.arange(columns), rows)
        following = start + max(rows, columns)
    positions[:, end:] = np.arange(following, following + layout.length - end, dtype=np.float32)
    return positions


def fill_segment(
    layout: SegmentLayout,
    prompt_ids: Sequence[int] | np.ndarray,
    text_ids: Sequence[int] | np.ndarray,
    *,
    bos_id: int,
    eos_id: int,
    image_id: int,
    audio_id: int,
    label_prompt: bool = False,
) -> SegmentArrays:
    """Token ids, labels, positions and spans of one segment.

    Raises:
        ValueError: the ids are more or fewer than the layout was planned for.
    """
    for name, ids, (start, end) in (("prompt", prompt_ids, layout.prompt), ("text", text_ids, layout.text)):
        if len(ids) != end - start:
            raise ValueError(f"the segment was planned for {end - start} {name} tokens, got {len(ids)}")
    input_ids = np.full(layout.length, eos_id, dtype=np.int64)
    input_ids[0] = bos_id
    input_ids[slice(*layout.image)] = image_id
    input_ids[slice(*layout.audio)] = audio_id
    input_ids[slice(*layout.prompt)] = prompt_ids
    input_ids[slice(*layout.text)] = text_ids

    learned = np.zeros(layout.length, dtype=bool)  # tokens that the model has to predict
    if label_prompt:
        learned[slice(*layout.prompt)] = True
    if layout.has_text:
        learned[layout.text[0] :] = True  # text and the [EOS] behind it
    labels = np.full(layout.length, IGNORE_INDEX, dtype=np.int64)
    labels[:-1][learned[1:]] = input_ids[1:][learned[1:]]

    span_kind = np.full(layout.length, SPAN_TEXT, dtype=np.int8)
    span_kind[slice(*layout.image)] = SPAN_IMAGE
    span_kind[slice(*layout.audio)] = SPAN_AUDIO
    span_ends = np.arange(1, layout.length + 1, dtype=np.int32)
    span_ends[slice(*layout.image)] = layout.image[1]
    return SegmentArrays(input_ids, labels, segment_positions(layout), span_kind, span_ends)
