"""Embeddings of every sample of a source, by modality."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trichord.batches.sequential import SequentialBatch


@dataclass(frozen=True)
class Embedded:
    """One modality of a source: embeds (N, E) fp32 of length 1 and groups (N,) int64, on the CPU."""

    embeds: Tensor
    groups: Tensor


Parts = dict[str, Embedded]


@torch.no_grad()
def embed_batches(
    model: Callable[..., Any], batches: Iterable[SequentialBatch], device: torch.device, modalities: Iterable[str]
) -> list[Parts]:
    """Run the towers over batches: one entry each, by modality; samples without a modality have no row in it."""
    modalities, found = tuple(modalities), []
    for item in batches:
        batch = item.batch
        output = model(batch.to(device), towers_only=True)
        with_text = (batch.text_spans[:, 1] > batch.text_spans[:, 0]).nonzero()[:, 0]
        segments = {"image": batch.image_segments, "audio": batch.audio_segments, "text": with_text}
        parts = {}
        for modality in modalities:
            embeds = getattr(output, f"{modality}_embeds").float().cpu()
            if modality == "text":
                embeds = embeds[with_text]
            parts[modality] = Embedded(embeds, batch.group_ids[segments[modality]])
        found.append(parts)
    return found


def join(batches: list[Parts]) -> Parts:
    """The rows of all batches, in their order."""
    return {
        modality: Embedded(
            torch.cat([parts[modality].embeds for parts in batches]),
            torch.cat([parts[modality].groups for parts in batches]),
        )
        for modality in (batches[0] if batches else ())
    }
