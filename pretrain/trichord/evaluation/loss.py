"""Next-token loss of a source, per label."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from trichord.batches.sequential import SequentialBatch


@torch.no_grad()
def next_token_sums(
    model: Callable[..., Any], batches: Iterable[SequentialBatch], device: torch.device
) -> tuple[float, int]:
    """Cross-entropy in nats, summed over all labels of this rank's batches, and how many labels there were."""
    total, labels = 0.0, 0
    for item in batches:
        output = model(item.batch.to(device))
        total += float(output.next_token_loss_sum)
        labels += item.batch.num_labels
    return total, labels
