"""Next-token loss of a source, per label."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trichord.batches.sequential import SequentialBatch
from trichord.fusion.model import Trichord


@torch.no_grad()
def next_token_loss(model: Trichord, batches: Iterable[SequentialBatch], device: torch.device) -> tuple[float, int]:
    """Cross-entropy in nats, averaged over all labels, and how many there were; (nan, 0) without any."""
    total, labels = 0.0, 0
    for item in batches:
        output = model(item.batch.to(device))
        assert output.next_token_loss_sum is not None
        total += float(output.next_token_loss_sum)
        labels += item.batch.num_labels
    return (total / labels if labels else math.nan), labels
