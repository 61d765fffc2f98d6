"""One row: planned and decoded samples become arrays; segments and positions are counted from the row's start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trichord.batches.interleave import StreamArrays, caption_span
from trichord.batches.packed_batch import SPAN_AUDIO, SPAN_IMAGE
from trichord.batches.windows import PlannedSample
from trichord.samples.config import TargetConfig
from trichord.samples.targets import count_columns


@dataclass(frozen=True)
class RowFormat:
    """What all rows of a run have in common.

    row_tokens: length. image_size: side of the pixels. pad_id, image_id, audio_id: the tokenizer's. num_mels: mel bins
    where workers compute log-mel, else 0. target_columns, num_targets: sizes of the targets.
    """

    row_tokens: int
    image_size: int
    pad_id: int
    image_id: int
    audio_id: int
    num_mels: int = 0
    target_columns: int = 0
    num_targets: int = 0

    @staticmethod
    def of(row_tokens: int, image_size: int, tokenizer, num_mels: int, targets: dict[str, TargetConfig]) -> RowFormat:
        ids = (tokenizer.pad_id, tokenizer.image_id, tokenizer.audio_id)
        return RowFormat(row_tokens, image_size, *ids, num_mels, count_columns(targets), len(targets))


@dataclass(frozen=True)
class RowArrays:
    """The parts of `PackedBatch` for one row of R tokens, S segments, I images, A clips; all numpy, same dtypes.

    What is large, `pixels`, `waveforms` and `log_mels`, is in pieces, to be laid end to end where it is copied anyway;
    there is always one, if an empty one. audio_lengths (A,) int64: samples of each clip; mel_lengths (A,) int64: its
    log-mel frames. Of `waveforms` and `log_mels` one is empty: log-mel is computed on the device or here.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    span_kind: np.ndarray
    span_ends: np.ndarray
    pixels: tuple[np.ndarray, ...]
    image_spans: np.ndarray
    image_segments: np.ndarray
    waveforms: tuple[np.ndarray, ...]
    log_mels: tuple[np.ndarray, ...]
    audio_lengths: np.ndarray
    mel_lengths: np.ndarray
    audio_spans: np.ndarray
    audio_segments: np.ndarray
    text_spans: np.ndarray
    group_ids: np.ndarray
    targets: np.ndarray
    target_present: np.ndarray
    sample_ids: np.ndarray
    bad_segments: np.ndarray


@dataclass(frozen=True)
class DecodedClip:
    """num_samples of a clip, and its waveform (num_samples,) int16 or its log-mel (frames, num_mels) float32."""

    num_samples: int
    waveform: np.ndarray | None = None
    log_mel: np.ndarray | None = None


DecodedItems = Sequence["np.ndarray | DecodedClip"]
"""Pixels (3, H, W) uint8 or clip of each item of a sample, in order."""


def build_row(planned: Sequence[PlannedSample], decoded: Sequence[DecodedItems | None], form: RowFormat) -> RowArrays:
    """Fill a row. `decoded[i]` None marks sample i as bad: its slot becomes slack and nothing else moves.

    Args:
        planned: the row's samples, in stream order; none gives an empty row.
    """
    stream = StreamArrays(form.row_tokens, form.pad_id, form.image_id, form.audio_id)
    items = _Items()
    start = 0
    for segment, (sample, content) in enumerate(zip(planned, decoded, strict=True)):
        if content is None:
            items.text_spans.append((start + 1, start + 1))
        else:
            stream.write(start, sample.parts, segment)
            items.add(segment, start, sample, content)
        start += sample.length
    good = np.array([content is not None for content in decoded], dtype=bool)
    present = np.array([sample.target_present for sample in planned], dtype=bool).reshape(
        len(planned), form.num_targets
    )
    return RowArrays(
        input_ids=stream.input_ids,
        labels=stream.labels,
        position_ids=stream.positions,
        segment_ids=stream.segment_ids,
        span_kind=stream.span_kind,
        span_ends=stream.span_ends,
        **items.arrays(form),
        group_ids=np.array([sample.group_id for sample in planned], dtype=np.int64),
        targets=np.array([sample.targets for sample in planned], dtype=np.float32).reshape(
            len(planned), form.target_columns
        ),
        target_present=present & good[:, None],
        sample_ids=np.array([sample.ref for sample in planned], dtype=np.int64).reshape(-1, 3),
        bad_segments=~good,
    )


class _Items:
    """Images, clips and texts of a row while it is filled."""

    def __init__(self) -> None:
        self.pixels: list[np.ndarray] = []
        self.image_spans: list[tuple[int, int]] = []
        self.image_segments: list[int] = []
        self.clips: list[DecodedClip] = []
        self.audio_spans: list[tuple[int, int]] = []
        self.audio_segments: list[int] = []
        self.text_spans: list[tuple[int, int]] = []

    def add(self, segment: int, start: int, sample: PlannedSample, content: DecodedItems) -> None:
        first, last = caption_span(sample.parts)
        self.text_spans.append((start + first, start + last))
        items = iter(content)
        at = start
        for part in sample.parts:
            span = at, at + part.length
            if part.kind == SPAN_IMAGE:
                self.pixels.append(next(items))  # pyright: ignore[reportArgumentType]
                self.image_spans.append(span)
                self.image_segments.append(segment)
            elif part.kind == SPAN_AUDIO:
                self.clips.append(next(items))  # pyright: ignore[reportArgumentType]
                self.audio_spans.append(span)
                self.audio_segments.append(segment)
            at = span[1]

    def arrays(self, form: RowFormat) -> dict[str, Any]:
        waveforms = tuple(clip.waveform for clip in self.clips if clip.waveform is not None)
        log_mels = tuple(clip.log_mel for clip in self.clips if clip.log_mel is not None)
        mel_lengths = [0 if clip.log_mel is None else len(clip.log_mel) for clip in self.clips]
        no_pixels = np.zeros((0, 3, form.image_size, form.image_size), dtype=np.uint8)
        return {
            "pixels": tuple(pixels[None] for pixels in self.pixels) or (no_pixels,),
            "image_spans": np.array(self.image_spans, dtype=np.int32).reshape(-1, 2),
            "image_segments": np.array(self.image_segments, dtype=np.int64),
            "waveforms": waveforms or (np.zeros(0, dtype=np.int16),),
            "log_mels": log_mels or (np.zeros((0, form.num_mels), dtype=np.float32),),
            "audio_lengths": np.array([clip.num_samples for clip in self.clips], dtype=np.int64),
            "mel_lengths": np.array(mel_lengths, dtype=np.int64),
            "audio_spans": np.array(self.audio_spans, dtype=np.int32).reshape(-1, 2),
            "audio_segments": np.array(self.audio_segments, dtype=np.int64),
            "text_spans": np.array(self.text_spans, dtype=np.int32).reshape(-1, 2),
        }
