"""The next-token loss split up by where a sample came from and what it holds, on the device; nothing waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch

KINDS = ("text", "image", "audio", "image_audio")
"""What a sample holds beside its text: bit 0 of the place stands for images, bit 1 for audio."""


def label_sums(batch: PackedBatch, losses: Tensor, num_sources: int) -> Tensor:
    """(num_sources, len(KINDS), 2) float64 of one micro-batch: sum of the losses, and number of labels.

    losses (K,): of this rank's labels, in the order of `batch.label_index`.
    """
    segments = batch.segment_ids[batch.label_index[batch.own.own(batch.own.labels)]].long()
    place = batch.sample_ids[:, 0] * len(KINDS)
    for items, segments_of_items, bit in (
        (batch.num_images, batch.image_segments, 1),
        (batch.num_audios, batch.audio_segments, 2),
    ):
        if items:  # filled, not added: a sample may hold several
            place = place + torch.zeros_like(place).index_fill_(0, segments_of_items, bit)
    values = torch.stack([losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)], dim=1)
    sums = values.new_zeros(num_sources * len(KINDS), 2)
    return sums.index_add_(0, place[segments], values).view(num_sources, len(KINDS), 2)


def loss_names(sums: Tensor, sources: list[str]) -> dict[str, float]:
    """Metric name -> mean loss per label, for each source and each kind of sample that had labels; sums on the host."""
    found = {}
    for split, names, part in (("source", sources, sums.sum(1)), ("modality", KINDS, sums.sum(0))):
        for name, (total, count) in zip(names, part.tolist(), strict=True):
            if count:
                found[f"train/loss/next_token/{split}/{name}"] = total / count
    return found
