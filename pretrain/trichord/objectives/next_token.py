"""Next-token prediction: cross-entropy summed over labelled rows, divided by the global number of labels."""

from __future__ import annotations

from torch import Tensor

from trichord.objectives.config import NextTokenConfig


def next_token_micro_loss(config: NextTokenConfig, loss_sum: Tensor, global_count: Tensor, dp_world: int) -> Tensor:
    """The loss to back-propagate on one rank in one micro-step.

    loss_sum: () fp32, cross-entropy summed over this micro-batch's labelled rows; global_count: () fp32, labels of the
    whole step over all ranks. Gradients are averaged over `dp_world` ranks, so the factor dp_world / global_count makes
    the sum over ranks and micro-steps the mean over all labels, whatever the split.
    """
    return loss_sum * (config.weight * dp_world / global_count.clamp(min=1.0))
