"""One row: planned and decoded samples become arrays; segments and positions are counted from the row's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.interleave import fill_segment
from trichord.batches.packed_batch import IGNORE_INDEX, SLACK_SEGMENT, SPAN_TEXT
from trichord.batches.tokenizer import TextTokenizer
from trichord.batches.windows import PlannedSample


@dataclass(frozen=True)
class RowArrays:
    """The parts of `PackedBatch` for one row of R tokens, S segments, I images, A clips; all numpy, same dtypes.

    audio_lengths (A,) int64: samples of each clip in `waveforms`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    span_kind: np.ndarray
    span_ends: np.ndarray
    pixels: np.ndarray
    image_spans: np.ndarray
    image_segments: np.ndarray
    waveforms: np.ndarray
    audio_lengths: np.ndarray
    audio_spans: np.ndarray
    audio_segments: np.ndarray
    text_spans: np.ndarray
    group_ids: np.ndarray
    sample_ids: np.ndarray
    bad_segments: np.ndarray


@dataclass(frozen=True)
class DecodedItems:
    """pixels (3, H, W) uint8 and waveform (n,) int16 of one sample; None where absent."""

    pixels: np.ndarray | None
    waveform: np.ndarray | None


def build_row(
    planned: Sequence[PlannedSample],
    decoded: Sequence[DecodedItems | None],
    tokenizer: TextTokenizer,
    batches: BatchesConfig,
    image_size: int,
    row_tokens: int | None = None,
) -> RowArrays:
    """Fill a row. `decoded[i]` None marks sample i as bad: its slot becomes slack and nothing else moves.

    Args:
        planned: the row's samples, in stream order; none gives an empty row. image_size: side of the pixels.
        row_tokens: length of the row where it is not `batches.row_tokens`.
    """
    length = batches.row_tokens if row_tokens is None else row_tokens
    row = _slack(length, tokenizer.pad_id)
    items = _Items()
    start = 0
    for segment, (sample, content) in enumerate(zip(planned, decoded, strict=True)):
        end = start + sample.layout.length
        if content is None:
            no_text = start + sample.layout.text[0]
            items.text_spans.append((no_text, no_text))
        else:
            arrays = fill_segment(
                sample.layout,
                sample.prompt_ids,
                sample.text_ids,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                image_id=tokenizer.image_id,
                audio_id=tokenizer.audio_id,
                label_prompt=batches.label_prompt,
            )
            row["input_ids"][start:end] = arrays.input_ids
            row["labels"][start:end] = arrays.labels
            row["position_ids"][:, start:end] = arrays.positions
            row["segment_ids"][start:end] = segment
            row["span_kind"][start:end] = arrays.span_kind
            row["span_ends"][start:end] = arrays.span_ends + start
            items.add(segment, start, sample, content)
        start = end
    return RowArrays(
        **row,
        **items.arrays(image_size),
        group_ids=np.array([sample.group_id for sample in planned], dtype=np.int64),
        sample_ids=np.array([sample.ref for sample in planned], dtype=np.int64).reshape(-1, 3),
        bad_segments=np.array([content is None for content in decoded], dtype=bool),
    )


def _slack(length: int, pad_id: int) -> dict[str, np.ndarray]:
    """A row of nothing: one causal run, so that a kernel that computes it meets nothing special."""
    return {
        "input_ids": np.full(length, pad_id, dtype=np.int64),
        "labels": np.full(length, IGNORE_INDEX, dtype=np.int64),
        "position_ids": np.zeros((3, length), dtype=np.float32),
        "segment_ids": np.full(length, SLACK_SEGMENT, dtype=np.int32),
        "span_kind": np.full(length, SPAN_TEXT, dtype=np.int8),
        "span_ends": np.arange(1, length + 1, dtype=np.int32),
    }


class _Items:
    """Images, clips and texts of a row while it is filled."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.image_spans: list[tuple[int, int]] = []
        self.image_segments: list[int] = []
        self.waveforms: list[np.ndarray] = []
        self.audio_spans: list[tuple[int, int]] = []
        self.audio_segments: list[int] = []
        self.text_spans: list[tuple[int, int]] = []

    def add(self, segment: int, start: int, sample: PlannedSample, content: DecodedItems) -> None:
        layout = sample.layout
        if content.pixels is not None:
            self.pixels.append(content.pixels)
            self.image_spans.append((start + layout.image[0], start + layout.image[1]))
            self.image_segments.append(segment)
        if content.waveform is not None:
            self.waveforms.append(content.waveform)
            self.audio_spans.append((start + layout.audio[0], start + layout.audio[1]))
            self.audio_segments.append(segment)
        self.text_spans.append((start + layout.text[0], start + layout.text[1]))

    def arrays(self, image_size: int) -> dict[str, np.ndarray]:
        no_pixels = np.zeros((0, 3, image_size, image_size), dtype=np.uint8)
        no_waveform = np.zeros(0, dtype=np.int16)
        return {
            "pixels": np.stack(self.pixels) if self.pixels else no_pixels,
            "image_spans": np.array(self.image_spans, dtype=np.int32).reshape(-1, 2),
            "image_segments": np.array(self.image_segments, dtype=np.int64),
            "waveforms": np.concatenate(self.waveforms) if self.waveforms else no_waveform,
            "audio_lengths": np.array([len(waveform) for waveform in self.waveforms], dtype=np.int64),
            "audio_spans": np.array(self.audio_spans, dtype=np.int32).reshape(-1, 2),
            "audio_segments": np.array(self.audio_segments, dtype=np.int64),
            "text_spans": np.array(self.text_spans, dtype=np.int32).reshape(-1, 2),
        }
