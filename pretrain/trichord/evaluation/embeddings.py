"""Embeddings of every sample of a source, by modality."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trichord.batches.sequential import SequentialBatch
from trichord.fusion.model import Trichord


@dataclass(frozen=True)
class Embedded:
    """One modality of a source: embeds (N, E) fp32 of length 1 and groups (N,) int64, on the CPU."""

    embeds: Tensor
    groups: Tensor


@torch.no_grad()
def embed_source(
    model: Trichord, batches: Iterable[SequentialBatch], device: torch.device, modalities: Iterable[str]
) -> dict[str, Embedded]:
    """Run the towers over a source; samples without a modality have no row in it."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {modality: [] for modality in modalities}
    for item in batches:
        batch = item.batch
        output = model(batch.to(device), towers_only=True)
        with_text = (batch.text_spans[:, 1] > batch.text_spans[:, 0]).nonzero()[:, 0]
        segments = {"image": batch.image_segments, "audio": batch.audio_segments, "text": with_text}
        for modality, found in parts.items():
            embeds = getattr(output, f"{modality}_embeds").float().cpu()
            if modality == "text":
                embeds = embeds[with_text]
            found.append((embeds, batch.group_ids[segments[modality]]))
    return {
        m: Embedded(torch.cat([e for e, _ in found]), torch.cat([g for _, g in found])) for m, found in parts.items()
    }
