"""Next-token prediction: cross-entropy summed over labelled rows, divided by the global number of labels."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord.objectives.config import NextTokenConfig


def next_token_micro_loss(config: NextTokenConfig, loss_sum: Tensor, global_count: Tensor, dp_world: int) -> Tensor:
    """The loss to back-propagate on one rank in one micro-step.

    loss_sum: () fp32, cross-entropy summed over this micro-batch's labelled rows; global_count: () labels of the whole
    step over all ranks, each as much as it weighs. Gradients are averaged over `dp_world` ranks, so the factor
    dp_world / global_count makes the sum over ranks and micro-steps the mean over all labels, whatever the split.
    """
    return loss_sum * (config.weight * dp_world / divisor(global_count))


def divisor(count: Tensor) -> Tensor:
    """A count to divide a sum by: 1 where it is 0, and there is nothing to sum up. Counts of weights may be below 1."""
    return torch.where(count > 0, count, 1.0)
