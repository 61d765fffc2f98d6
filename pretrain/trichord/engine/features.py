"""Features of all samples of a step, over micro-steps and ranks, for objectives whose candidates are the global batch.

Every sample of a step has a slot on one rank: micro-batch x row x place in the row, a fixed number per rank, so that
the gather has one size for the whole run and nobody has to ask how many samples the others have. Ranks that share rows
share out their samples, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch
from trichord.objectives.config import ContrastiveConfig
from trichord.objectives.contrastive import MODALITIES, FeatureTable, contrastive_gradients


@dataclass(frozen=True)
class SlotLayout:
    """slots_per_micro_batch = micro_rows * max_samples_per_row, shared out by ranks that share rows; slots (per rank,
    step) = that times micro-batches."""

    slots_per_micro_batch: int
    num_micro_batches: int

    @classmethod
    def of(cls, samples: int, sharing: int, num_micro_batches: int) -> SlotLayout:
        """samples: that a micro-batch may have; sharing: ranks that hold the same rows."""
        return cls(math.ceil(samples / sharing), num_micro_batches)

    @property
    def slots(self) -> int:
        return self.slots_per_micro_batch * self.num_micro_batches


@dataclass(frozen=True)
class FeatureGradients:
    """Gradients of the global contrastive loss by this rank's features, in slots, and by the learned scalars."""

    features: dict[str, Tensor]
    scalars: dict[str, Tensor]
    losses: dict[str, Tensor]
    layout: SlotLayout

    def of_micro_batch(self, number: int, batch: PackedBatch) -> dict[str, Tensor]:
        """For `objectives.combine.micro_loss`: gradient by each feature row of this micro-batch's output."""
        first = number * self.layout.slots_per_micro_batch - batch.own.own(batch.own.segments).start
        grads = dict(self.scalars)
        for modality, rows in _segments_of(batch).items():
            if modality in self.features:
                grads[modality] = self.features[modality][first + rows]
        return grads


def _segments_of(batch: PackedBatch) -> dict[str, Tensor]:
    """Modality -> for each feature row of the model's output, the segment it belongs to."""
    own = batch.own
    text = torch.arange(batch.num_segments, device=batch.input_ids.device)[own.own(own.segments)]
    image = batch.image_segments[own.own(own.images.contrasted)]
    return {"image": image, "audio": batch.audio_segments[own.own(own.audios.contrasted)], "text": text}


def features_of_step(
    outputs: Sequence[dict[str, Tensor]], batches: Sequence[PackedBatch], layout: SlotLayout
) -> FeatureTable:
    """This rank's features in their slots: modality -> (slots, E) fp32."""
    device = batches[0].input_ids.device
    features: dict[str, Tensor] = {}
    present = {m: torch.zeros(layout.slots, dtype=torch.bool, device=device) for m in MODALITIES}
    group_ids = torch.zeros(layout.slots, dtype=torch.int64, device=device)
    for number, (output, batch) in enumerate(zip(outputs, batches)):
        own, begin = batch.own.own(batch.own.segments), number * layout.slots_per_micro_batch
        if (count := own.stop - own.start) > layout.slots_per_micro_batch:
            raise ValueError(
                f"micro-batch has {count} samples on this rank, but only {layout.slots_per_micro_batch} slots "
                "(micro_rows * max_samples_per_row, over the ranks that share rows)"
            )
        group_ids[begin : begin + count] = batch.group_ids[own]
        first = begin - own.start  # segments are numbered through the whole micro-batch
        for modality, segments in _segments_of(batch).items():
            embeds = output.get(f"{modality}_embeds")
            if embeds is None:
                continue
            if modality not in features:
                features[modality] = torch.zeros(layout.slots, embeds.shape[1], device=device)
            features[modality][first + segments] = embeds.detach().float()
            present[modality][first + segments] = _presence(modality, batch, segments)
    return FeatureTable(features, present, group_ids)


def _presence(modality: str, batch: PackedBatch, segments: Tensor) -> Tensor:
    """Whether each feature row, of these segments, counts."""
    if modality == "text":
        has_text = (batch.text_spans[:, 1] > batch.text_spans[:, 0]) & ~batch.bad_segments
        return has_text[segments]
    # A document with several images is no pair with any one of them, and its slot can hold one feature only.
    counts = torch.zeros(batch.num_segments, dtype=torch.int64, device=segments.device)
    counts.index_add_(0, segments, torch.ones_like(segments))
    return counts[segments] == 1


def gradients_of_step(
    config: ContrastiveConfig, own: FeatureTable, output: dict[str, Tensor], layout: SlotLayout
) -> FeatureGradients:
    """Gather all ranks' features, compute this rank's rows of the loss, and exchange the gradients by candidate."""
    everyone = _gather(own)
    scale, bias = output["logit_scale"], output["logit_bias"]
    candidate_grads, mine = contrastive_gradients(config, own, everyone, scale, bias)
    names = sorted(candidate_grads)
    # One message: the gradients by all candidates side by side, then those by the learned scalars in a last row.
    packed = torch.cat([candidate_grads[name] for name in names], dim=1)
    scalars = torch.zeros(1, packed.shape[1], device=packed.device)
    scalars[0, 0], scalars[0, 1] = mine.logit_scale[0], mine.logit_bias[0]
    packed = torch.cat([packed, scalars])
    dist.all_reduce(packed)
    rank = dist.get_rank()
    own_part = packed[rank * layout.slots : (rank + 1) * layout.slots].split(
        [candidate_grads[name].shape[1] for name in names], dim=1
    )
    features = {name: mine.features[name] + part for name, part in zip(names, own_part)}
    learned = {"logit_scale": packed[-1, 0:1].clone(), "logit_bias": packed[-1, 1:2].clone()}
    losses = {f"contrastive_{pair.replace('-', '_')}": loss for pair, loss in mine.losses.items()}
    return FeatureGradients(features, learned, losses, layout)


def _gather(own: FeatureTable) -> FeatureTable:
    """The tables of all ranks below each other, in rank order."""
    world_size = dist.get_world_size()
    features = {name: _all_gather(tensor, world_size) for name, tensor in sorted(own.features.items())}
    facts = torch.stack([own.group_ids, *(own.present[m].long() for m in MODALITIES)], dim=1)
    facts = _all_gather(facts, world_size)
    present = {m: facts[:, 1 + i].bool() for i, m in enumerate(MODALITIES)}
    return FeatureTable(features, present, facts[:, 0])


def _all_gather(tensor: Tensor, world_size: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
