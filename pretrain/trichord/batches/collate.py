"""Rows to one `PackedBatch`: lay the rows end to end and count segments and positions from the batch's start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trichord.batches.packed_batch import IGNORE_INDEX, SLACK_SEGMENT, PackedBatch
from trichord.batches.rows import RowArrays

_PLAIN = (
    *("input_ids", "labels", "span_kind", "group_ids", "targets", "target_present", "sample_ids", "bad_segments"),
)
_IN_PIECES = ("pixels", "waveforms", "log_mels")


def collate(rows: Sequence[RowArrays]) -> PackedBatch:
    """One micro-batch of the given rows, of whatever lengths; T is their sum. One row alone is not copied.

    Runs of slack end at row borders too, so that no run, and no attention over one, is longer than a row.
    """
    row_starts = _starts([len(row.input_ids) for row in rows])
    segment_starts = _starts([len(row.group_ids) for row in rows])
    parts = {name: _joined([getattr(row, name) for row in rows]) for name in _PLAIN}
    for name in _IN_PIECES:
        parts[name] = _joined([piece for row in rows for piece in getattr(row, name)])
    for name in ("span_ends", "image_spans", "audio_spans", "text_spans"):
        parts[name] = _counted_on([getattr(row, name) for row in rows], row_starts)
    for name in ("image_segments", "audio_segments"):
        parts[name] = _counted_on([getattr(row, name) for row in rows], segment_starts)
    parts["segment_ids"] = _counted_on([row.segment_ids for row in rows], segment_starts, but=SLACK_SEGMENT)
    parts["position_ids"] = _joined([row.position_ids for row in rows], axis=1)
    parts["label_index"] = np.flatnonzero(parts["labels"] != IGNORE_INDEX)
    parts["cu_seqlens"] = _run_boundaries(parts["segment_ids"], row_starts)
    parts["image_index"] = _positions(parts["image_spans"])
    parts["audio_index"] = _positions(parts["audio_spans"])
    real = parts["segment_ids"] != SLACK_SEGMENT
    causal_pairs, visible_pairs = _count_pairs(real, parts["cu_seqlens"], parts["span_ends"])
    tensors: dict[str, Any] = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parts.items()}
    return PackedBatch(
        **tensors,
        audio_offsets=tuple(_starts([int(n) for row in rows for n in row.audio_lengths])),
        mel_offsets=tuple(_starts([int(n) for row in rows for n in row.mel_lengths])),
        image_counts=_lengths(parts["image_spans"]),
        audio_counts=_lengths(parts["audio_spans"]),
        text_lengths=_lengths(parts["text_spans"]),
        num_segments=segment_starts[-1],
        num_images=len(parts["pixels"]),
        num_audios=len(parts["audio_spans"]),
        num_labels=len(parts["label_index"]),
        max_seqlen=int(np.diff(parts["cu_seqlens"]).max(initial=0)),
        useful_tokens=int(np.count_nonzero(real)),
        causal_pairs=causal_pairs,
        visible_pairs=visible_pairs,
    )


def _count_pairs(real: np.ndarray, boundaries: np.ndarray, span_ends: np.ndarray) -> tuple[int, int]:
    """Pairs of query and key that see each other: causal throughout, and by `span_ends`. Slack sees nothing."""
    starts = boundaries[:-1].astype(np.int64)
    lengths = np.diff(boundaries) * real[starts]  # a run is slack or none of it is
    visible = span_ends.sum(dtype=np.int64, where=real) - (starts * lengths).sum()
    return int((lengths.astype(np.int64) * (lengths + 1) // 2).sum()), int(visible)


def _joined(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    # What a decoder gives may be read-only, and tensors over such memory are not to be had.
    return arrays[0] if len(arrays) == 1 and arrays[0].flags.writeable else np.concatenate(arrays, axis)


def _counted_on(arrays: Sequence[np.ndarray], starts: Sequence[int], but: int | None = None) -> np.ndarray:
    """Joined, each counted from its start (the first one's is 0); numbers that are `but` stay as they are."""
    shifted = [arrays[0]]
    for array, start in zip(arrays[1:], starts[1:]):
        shifted.append(array + array.dtype.type(start))
        if but is not None:
            shifted[-1][array == but] = but
    return _joined(shifted)


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each part starts when they are laid end to end, and where the last one ends."""
    return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]


def _run_boundaries(segment_ids: np.ndarray, row_starts: Sequence[int]) -> np.ndarray:
    changes = np.flatnonzero(segment_ids[1:] != segment_ids[:-1]) + 1
    return np.union1d(changes, row_starts).astype(np.int32)


def _positions(spans: np.ndarray) -> np.ndarray:
    """All stream positions inside the spans (n, 2), span by span, int64."""
    starts, lengths = spans[:, 0].astype(np.int64), spans[:, 1] - spans[:, 0]
    before = np.cumsum(lengths, dtype=np.int64) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum(), dtype=np.int64)


def _lengths(spans: np.ndarray) -> tuple[int, ...]:
    return tuple((spans[:, 1] - spans[:, 0]).tolist())
