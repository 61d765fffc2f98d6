"""The objectives of a run together: what each needs counted, and the loss of one micro-step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trichord.objectives.config import ObjectivesConfig
from trichord.objectives.next_token import next_token_micro_loss


def micro_loss(
    objectives: ObjectivesConfig,
    output: Mapping[str, Tensor],
    global_labels: Tensor,
    feature_grads: Mapping[str, Tensor],
    dp_world: int,
    num_micro_batches: int,
) -> Tensor:
    """One micro-step's loss on one rank: () fp32, ready for `engine.backward(loss, scale_wrt_gas=False)`.

    output: the model's output as a dict (see fusion.model.ModelOutput); global_labels: () labels of the whole step;
    feature_grads: `image`, `audio`, `text` -> gradient of the global contrastive loss by this micro-batch's features,
    and `logit_scale`, `logit_bias` -> (1,) by the learned scalars; empty when contrastive is off.
    The model's placeholder term is part of every loss, so that no rank skips a module.
    """
    loss = output["placeholder"].float()
    if objectives.next_token is not None:
        loss = loss + next_token_micro_loss(
            objectives.next_token, output["next_token_loss_sum"], global_labels, dp_world
        )
    for modality in ("image", "audio", "text"):
        if modality in feature_grads:
            surrogate = (output[f"{modality}_embeds"].float() * feature_grads[modality]).sum()
            loss = loss + surrogate * dp_world
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in feature_grads:
            # Equal on all ranks and averaged over them: each micro-step adds its share.
            loss = loss + (output[scalar].float() * feature_grads[scalar]).sum() / num_micro_batches
    return loss


def total_loss(objectives: ObjectivesConfig, losses: Mapping[str, float]) -> float:
    """The weighted sum that is minimised, from the losses by name (contrastive pairs are averaged)."""
    total = 0.0
    if objectives.next_token is not None:
        total += objectives.next_token.weight * losses["next_token"]
    if objectives.contrastive is not None:
        pairs = [losses[f"contrastive_{pair.replace('-', '_')}"] for pair in objectives.contrastive.pairs]
        total += objectives.contrastive.weight * sum(pairs) / len(pairs)
    return total
