"""What a model is given, as plain numbers: what its work grows with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields

from trichord.batches.packed_batch import PackedBatch
from trichord.encoders.lengths import mel_frames
from trichord.fusion.model import Trichord


@dataclass(frozen=True)
class Counts:
    """Sums over micro-batches, of one rank or of many; they can be added, and multiplied by a number.

    tokens: of the trunk's stream. causal_pairs, visible_pairs: pairs of query and key in it that see each other, if
    all were causal, and with image blocks both ways; over all segments. labels: positions with a label.
    images. clips, frames (log-mel), audio_tokens, audio_pairs (their square, summed over clips): of the audio tower;
    frames_on_device: those not computed by workers; audio_features: tokens through the connector.
    texts, text_tokens, text_pairs: of the text tower. contrasts: similarities in the contrastive losses: rows times
    candidates, summed over pairs of modalities and directions.
    """

    tokens: float = 0.0
    causal_pairs: float = 0.0
    visible_pairs: float = 0.0
    labels: float = 0.0
    images: float = 0.0
    clips: float = 0.0
    frames: float = 0.0
    frames_on_device: float = 0.0
    audio_tokens: float = 0.0
    audio_pairs: float = 0.0
    audio_features: float = 0.0
    texts: float = 0.0
    text_tokens: float = 0.0
    text_pairs: float = 0.0
    contrasts: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Counts:
        return Counts(*(factor * getattr(self, f.name) for f in fields(self)))


def useful_counts(batch: PackedBatch, model: Trichord) -> Counts:
    """What a micro-batch asks for: no slack, no padding, no placeholders. Reads host facts only."""
    clips, texts = _clips(batch, model), [length for length in _texts(batch, model) if length]
    return Counts(
        tokens=batch.useful_tokens,
        causal_pairs=batch.causal_pairs,
        visible_pairs=batch.visible_pairs,
        labels=batch.num_labels,
        images=batch.num_images,
        clips=len(clips),
        frames=sum(frames for frames, _ in clips),
        frames_on_device=0 if _has_log_mels(batch) else sum(frames for frames, _ in clips),
        audio_tokens=sum(tokens for _, tokens in clips),
        audio_pairs=sum(tokens**2 for _, tokens in clips),
        audio_features=sum(tokens for _, tokens in clips),
        texts=len(texts),
        text_tokens=sum(texts),
        text_pairs=sum(length**2 for length in texts),
    )


def executed_counts(batch: PackedBatch, model: Trichord) -> Counts:
    """What runs for a micro-batch: slack, items padded to the longest, and a placeholder where a modality has no item.

    Attention over the stream does no work on slack.
    """
    clips = _clips(batch, model)
    if model.audio is not None and not clips:
        clips = [(model.audio.config.stride, 1)]
    frames = len(clips) * max((frames for frames, _ in clips), default=0)
    longest_clip = max((tokens for _, tokens in clips), default=0)
    texts = _texts(batch, model) or ([1] if model.text is not None else [])
    longest_text = max(1, *texts) if texts else 0
    return Counts(
        tokens=batch.input_ids.shape[0],
        causal_pairs=batch.causal_pairs,
        visible_pairs=batch.visible_pairs,
        labels=max(1, batch.num_labels),
        images=max(1, batch.num_images),
        clips=len(clips),
        frames=frames,
        frames_on_device=0 if _has_log_mels(batch) else frames,
        audio_tokens=len(clips) * longest_clip,
        audio_pairs=len(clips) * longest_clip**2,
        audio_features=sum(tokens for _, tokens in clips),
        texts=len(texts),
        text_tokens=len(texts) * longest_text,
        text_pairs=len(texts) * longest_text**2,
    )


def count_contrasts(slots: int, ranks: int, pairs: int, directions: int) -> int:
    """Similarities that one rank computes in a step: its slots against those of all ranks, filled or not.

    directions: 2 for `infonce`, 1 for `sigmoid`.
    """
    return slots * slots * ranks * pairs * directions


def _has_log_mels(batch: PackedBatch) -> bool:
    return batch.mel_offsets[-1] > 0


def _clips(batch: PackedBatch, model: Trichord) -> list[tuple[int, int]]:
    """(log-mel frames, tokens) of each clip."""
    if model.audio is None:
        return []
    if _has_log_mels(batch):
        frames = [end - start for start, end in itertools.pairwise(batch.mel_offsets)]
        return list(zip(frames, model.audio.count_mel_tokens(batch.mel_offsets)))
    lengths = [end - start for start, end in itertools.pairwise(batch.audio_offsets)]
    frames = [mel_frames(model.audio.config, length) for length in lengths]
    return list(zip(frames, model.audio.count_tokens(batch.audio_offsets)))


def _texts(batch: PackedBatch, model: Trichord) -> list[int]:
    """Tokens of each segment's text that the text tower reads."""
    return [min(length, model.text.max_tokens) for length in batch.text_lengths] if model.text is not None else []
