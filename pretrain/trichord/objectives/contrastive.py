"""Contrastive losses over the whole global batch, and the gradient of the loss by every feature.

The gradient by feature is found once per step from the gathered features of all ranks and micro-steps; each
micro-step then re-runs its towers and back-propagates `features * stored_gradient` (GradCache, Gao et al. 2021). So
the gradient does not depend on world size, packing or accumulation.

Shapes: C candidates (slots of all ranks and micro-steps, most of them possibly empty), R rows computed on this rank,
E embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord.objectives.config import ContrastiveConfig, Pair

MODALITIES = ("image", "audio", "text")


@dataclass(frozen=True)
class FeatureTable:
    """Features of a set of segment slots, a row each.

    features: modality -> (C, E) fp32, L2-normalised, zero where absent; present: modality -> (C,) bool;
    group_ids: (C,) int64, equal for items that are positives of each other.
    """

    features: dict[str, Tensor]
    present: dict[str, Tensor]
    group_ids: Tensor


def pair_modalities(pair: Pair) -> tuple[str, str]:
    """`image-text` -> ("image", "text")."""
    query, target = pair.split("-")
    return query, target


def pair_count(table: FeatureTable, pair: Pair) -> Tensor:
    """Number of slots that have both modalities of `pair`: a () fp32 tensor on the table's device."""
    query, target = pair_modalities(pair)
    return (table.present[query] & table.present[target]).sum().float()


def rows_loss(
    kind: str,
    rows: FeatureTable,
    candidates: FeatureTable,
    pair: Pair,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> Tensor:
    """Sum of the losses of this rank's rows against all candidates, both directions, before division by the count.

    A slot that lacks either modality of the pair is neither row nor candidate. Candidates with the row's group are all
    positives. `infonce`: -1/|P| sum over positives of log softmax (supervised contrastive, Khosla et al. 2020, eq. 2),
    half of each direction. `sigmoid`: -sum over candidates of log sigmoid(z (s x.y + b)), z = +1 for positives and -1
    otherwise (SigLIP, Zhai et al. 2023, eq. 1); one direction covers all pairs.

    Returns:
        () fp32; exactly 0 where no row has both modalities.
    """
    query, target = pair_modalities(pair)
    row_valid = rows.present[query] & rows.present[target]
    valid = candidates.present[query] & candidates.present[target]
    positive = (rows.group_ids[:, None] == candidates.group_ids[None, :]) & valid[None, :]
    forward_logits = logit_scale * rows.features[query] @ candidates.features[target].T
    if kind == "sigmoid":
        return _sigmoid_rows(forward_logits + logit_bias, positive, valid, row_valid)
    backward_logits = logit_scale * rows.features[target] @ candidates.features[query].T
    return 0.5 * (
        _infonce_rows(forward_logits, positive, valid, row_valid)
        + _infonce_rows(backward_logits, positive, valid, row_valid)
    )


def _infonce_rows(logits: Tensor, positive: Tensor, valid: Tensor, row_valid: Tensor) -> Tensor:
    # A finite floor instead of -inf: a row without any candidate must give 0, not NaN, also in its gradient.
    masked = logits.masked_fill(~valid[None, :], torch.finfo(logits.dtype).min / 2)
    log_prob = F.log_softmax(masked, dim=1)
    row_loss = -(log_prob * positive).sum(1) / positive.sum(1).clamp(min=1)
    return (row_loss * row_valid).sum()


def _sigmoid_rows(logits: Tensor, positive: Tensor, valid: Tensor, row_valid: Tensor) -> Tensor:
    sign = positive.to(logits.dtype) * 2 - 1
    losses = -F.logsigmoid(sign * logits) * valid[None, :]
    return (losses.sum(1) * row_valid).sum()


@dataclass(frozen=True)
class ContrastiveGradients:
    """What one rank needs to back-propagate: gradients of the *global* loss.

    features: modality -> (R, E) by this rank's slots; logit_scale, logit_bias: (1,);
    losses: pair -> () this rank's share of the global loss (sum over ranks = the loss).
    """

    features: dict[str, Tensor]
    logit_scale: Tensor
    logit_bias: Tensor
    losses: dict[str, Tensor]


def contrastive_gradients(
    config: ContrastiveConfig,
    rows: FeatureTable,
    candidates: FeatureTable,
    logit_scale: Tensor,
    logit_bias: Tensor,
) -> tuple[dict[str, Tensor], ContrastiveGradients]:
    """Loss of this rank's rows, and its gradients.

    Every rank computes its own rows against all candidates. A candidate's gradient comes from the rows of all ranks,
    so the first return value, modality -> (C, E), still has to be summed over ranks before the own slots are taken;
    the `features` of the second hold the part that came through the rows and is complete.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in candidates.features.items()}
    own = {name: tensor.detach().requires_grad_() for name, tensor in rows.features.items()}
    scale, bias = (tensor.detach().float().requires_grad_() for tensor in (logit_scale, logit_bias))
    row_table = FeatureTable(own, rows.present, rows.group_ids)
    all_table = FeatureTable(leaves, candidates.present, candidates.group_ids)
    with torch.enable_grad():
        losses = {
            pair: rows_loss(config.kind, row_table, all_table, pair, scale, bias)
            / pair_count(candidates, pair).clamp(min=1)
            for pair in config.pairs
        }
        total = torch.stack(list(losses.values())).sum() * (config.weight / len(config.pairs))
    inputs = [*leaves.values(), *own.values(), scale, bias]
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
    split = len(leaves)
    candidate_grads = dict(zip(leaves, grads[:split]))
    own_grads = dict(zip(own, grads[split:-2]))
    return candidate_grads, ContrastiveGradients(
        own_grads, grads[-2], grads[-1], {pair: loss.detach() for pair, loss in losses.items()}
    )
