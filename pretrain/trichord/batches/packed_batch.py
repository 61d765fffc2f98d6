"""`PackedBatch`: the only thing models ever receive. One micro-batch of one rank, packed into a flat token stream.

Shapes: T = micro_rows * row_tokens, fixed for the run; S segments (samples, in stream order); I images; A audio clips.
Everything the host needs to know is a Python int or tuple in here, so that no model has to synchronise to learn a size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trichord.batches.sequence_part import Items, SequencePart, part_of, whole

IGNORE_INDEX = -100
SLACK_SEGMENT = -1

SPAN_TEXT = 0
SPAN_IMAGE = 1
SPAN_AUDIO = 2


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of one rank.

    Stream:
        input_ids (T,) int64: token ids; positions of images and audio hold the tokenizer's placeholder ids, slack its
            pad id.
        labels (T,) int64: `labels[t]` is what the hidden state at t has to predict (already shifted), or IGNORE_INDEX.
        label_index (K,) int64: the positions t with a label, ascending; K may be 0.
        position_ids (3, T) float32: positions on the axes time, height, width; equal on all axes for text.
        segment_ids (T,) int32: 0..S-1, or SLACK_SEGMENT for slack.
        cu_seqlens (C+1,) int32: boundaries of all contiguous runs of one segment id, slack runs included; from 0 to T.
        span_kind (T,) int8: SPAN_TEXT, SPAN_IMAGE or SPAN_AUDIO.
        span_ends (T,) int32: query t sees keys j of its own segment with j < span_ends[t]: t + 1 where causal,
            the end of the image block inside one.
    Items:
        pixels (I, C, H, W) uint8: not yet normalised.
        image_spans (I, 2) int32: start and end of the image's tokens in the stream (equal: not in the stream).
        image_segments (I,) int64: the segment each image belongs to.
        image_index (sum of span lengths,) int64: stream positions of all image tokens, image by image.
        waveforms (N,) int16: all clips end to end, mono, at the configured rate; empty where workers compute log-mel.
        audio_offsets: A + 1 Python ints, where each clip starts and ends in samples: in `waveforms`, where it is there.
        log_mels (F, num_mels) float32: log-mel frames of all clips end to end, where workers compute them, else none.
        mel_offsets: A + 1 Python ints into `log_mels`.
        audio_spans (A, 2) int32, audio_segments (A,) int64, audio_index: as for images.
        text_spans (S, 2) int32: start and end of each segment's caption tokens in the stream (equal: no text).
    Samples:
        targets (S, C) float32: values of `samples.targets`, in its order: one column for a class number or a number,
            one per class, 0 or 1, where there may be several. target_present (S, N) bool: which targets a sample has.
        group_ids (S,) int64: equal for samples that count as the same item in contrastive objectives.
        sample_ids (S, 3) int64: source number, epoch, sample number inside the source. The pieces of a sample that is
            longer than a row have the same.
        bad_segments (S,) bool: decoded badly; its tokens are slack, its items absent.
        label_weights (K,) float32: how much each label counts in training, by its sample's source; None: all alike.
    Host facts:
        num_segments, num_images, num_audios, num_labels, max_seqlen, useful_tokens (non-slack).
        causal_pairs, visible_pairs: pairs of query and key in one segment with key <= query, and with key < span_ends.
        image_counts, audio_counts: tokens per image and per clip in the stream, as tuples of ints.
        part: what of the batch this rank computes, where several share it; None: all of it.
        label_weight_sum: of this rank's labels; None: as many as there are.
    """

    input_ids: Tensor
    labels: Tensor
    label_index: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    cu_seqlens: Tensor
    span_kind: Tensor
    span_ends: Tensor
    pixels: Tensor
    image_spans: Tensor
    image_segments: Tensor
    image_index: Tensor
    waveforms: Tensor
    log_mels: Tensor
    audio_spans: Tensor
    audio_segments: Tensor
    audio_index: Tensor
    text_spans: Tensor
    group_ids: Tensor
    targets: Tensor
    target_present: Tensor
    sample_ids: Tensor
    bad_segments: Tensor
    audio_offsets: tuple[int, ...]
    mel_offsets: tuple[int, ...]
    image_counts: tuple[int, ...]
    audio_counts: tuple[int, ...]
    text_lengths: tuple[int, ...]
    num_segments: int
    num_images: int
    num_audios: int
    num_labels: int
    max_seqlen: int
    useful_tokens: int
    causal_pairs: int
    visible_pairs: int
    part: SequencePart | None = None
    label_weights: Tensor | None = None
    label_weight_sum: float | None = None

    @property
    def label_weight(self) -> float:
        """Of all labels that this rank computes."""
        return self.own.count(self.own.labels) if self.label_weight_sum is None else self.label_weight_sum

    @property
    def own(self) -> SequencePart:
        """What of the batch this rank computes."""
        if self.part is not None:
            return self.part
        counts = self.num_segments, self.image_counts, self.audio_counts
        return whole(self.input_ids.shape[0], self.num_labels, self.useful_tokens, *counts)

    def shared(self, place: int, size: int) -> PackedBatch:
        """The same batch, on the CPU, as rank `place` of `size` that share it computes it. Raises ValueError: its
        tokens do not divide."""
        if size == 1:
            return self
        part = part_of(
            place,
            size,
            segment_ids=self.segment_ids.numpy(),
            label_index=self.label_index.numpy(),
            num_segments=self.num_segments,
            images=Items(self.image_counts, self.image_index.numpy(), self.image_segments.numpy()),
            audios=Items(self.audio_counts, self.audio_index.numpy(), self.audio_segments.numpy()),
        )
        return replace(self, part=part)._weighed()

    def weighed(self, source_weights: Tensor) -> PackedBatch:
        """The same batch, on the CPU, whose labels count by the source of their sample. source_weights (sources,)."""
        segments = self.segment_ids[self.label_index].long()
        return replace(self, label_weights=source_weights[self.sample_ids[segments, 0]])._weighed()

    def _weighed(self) -> PackedBatch:
        if self.label_weights is None:
            return self
        own = self.label_weights[self.own.own(self.own.labels)]
        return replace(self, label_weight_sum=float(own.double().sum()))

    def unshared(self) -> PackedBatch:
        """The same batch for one rank to compute alone."""
        return replace(self, part=None)._weighed()

    def clips(self, chosen: slice) -> tuple[Tensor, list[int], Tensor, list[int]]:
        """Waveforms, audio_offsets, log_mels and mel_offsets of some clips, one after the other; offsets from 0."""
        waveforms, audio_offsets = self.waveforms, self.audio_offsets[chosen.start : chosen.stop + 1]
        mel_offsets = self.mel_offsets[chosen.start : chosen.stop + 1]
        if not self.log_mels.shape[0]:
            waveforms = waveforms[audio_offsets[0] : audio_offsets[-1]]
        log_mels = self.log_mels[mel_offsets[0] : mel_offsets[-1]]
        rebased = [[offset - offsets[0] for offset in offsets] for offsets in (audio_offsets, mel_offsets)]
        return waveforms, rebased[0], log_mels, rebased[1]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device` (asynchronously where the source is pinned)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; needs CUDA."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change) -> PackedBatch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})

    def check(self) -> None:
        """Verify that all parts agree (on CPU tensors; meant for tests and the loader's first batch).

        Raises:
            ValueError: naming both numbers that disagree.
        """
        total = self.input_ids.shape[0]
        for name in ("labels", "segment_ids", "span_kind", "span_ends"):
            _equal(f"{name}.shape[0]", getattr(self, name).shape[0], "T", total)
        _equal("position_ids.shape[1]", self.position_ids.shape[1], "T", total)
        _equal("cu_seqlens[-1]", int(self.cu_seqlens[-1]), "T", total)
        _equal("labels that are set", int((self.labels != IGNORE_INDEX).sum()), "num_labels", self.num_labels)
        _equal("label_index.shape[0]", self.label_index.shape[0], "num_labels", self.num_labels)
        _equal("pixels.shape[0]", self.pixels.shape[0], "num_images", self.num_images)
        _equal("image_index.shape[0]", self.image_index.shape[0], "sum of image_counts", sum(self.image_counts))
        _equal("audio_index.shape[0]", self.audio_index.shape[0], "sum of audio_counts", sum(self.audio_counts))
        _equal("len(audio_offsets) - 1", len(self.audio_offsets) - 1, "num_audios", self.num_audios)
        _equal("len(mel_offsets) - 1", len(self.mel_offsets) - 1, "num_audios", self.num_audios)
        _equal("mel_offsets[-1]", self.mel_offsets[-1], "log_mels.shape[0]", self.log_mels.shape[0])
        if not self.log_mels.shape[0]:
            _equal("audio_offsets[-1]", self.audio_offsets[-1], "waveforms.shape[0]", self.waveforms.shape[0])
        for name in ("text_spans", "group_ids", "targets", "target_present", "sample_ids", "bad_segments"):
            _equal(f"{name}.shape[0]", getattr(self, name).shape[0], "num_segments", self.num_segments)
        if total and int(self.segment_ids.max()) >= self.num_segments:
            raise ValueError(
                f"segment_ids reach {int(self.segment_ids.max())}, but num_segments is {self.num_segments}"
            )


def _equal(left_name: str, left: int, right_name: str, right: int) -> None:
    if left != right:
        raise ValueError(f"PackedBatch does not agree with itself: {left_name} is {left}, {right_name} is {right}")
