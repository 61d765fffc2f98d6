"""Contrastive losses over the whole global batch, and the gradient of the loss by every feature.

The gradient by feature is found once per step from the gathered features of all ranks and micro-steps; each
micro-step then re-runs its towers and back-propagates `features * stored_gradient` (GradCache, Gao et al. 2021). So
the gradient does not depend on world size, packing or accumulation.

Shapes: C candidates (slots of all ranks and micro-steps, most of them possibly empty), R rows computed on this rank,
E embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from trichord.objectives.config import ContrastiveConfig, Pair
from trichord_kernels import contrastive_loss

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
    positives. The losses are those of `trichord_kernels.contrastive_loss`, which never holds the R x C logits:
    `infonce` is half of each direction, `sigmoid` covers all pairs in one.

    Returns:
        () fp32; exactly 0 where no row has both modalities.
    """
    slots = _pair_slots(rows, candidates, pair)
    losses = [
        weight
        * contrastive_loss(
            rows.features[query],
            candidates.features[target],
            logit_scale,
            logit_bias,
            kind=kind,
            symmetric=False,
            **slots,
        )
        for weight, query, target in _directions(kind, pair)
    ]
    return torch.stack(losses).sum()


def _directions(kind: str, pair: Pair) -> list[tuple[float, str, str]]:
    """(weight, modality of the rows, modality of the candidates) of each direction of a pair."""
    query, target = pair_modalities(pair)
    return [(1.0, query, target)] if kind == "sigmoid" else [(0.5, query, target), (0.5, target, query)]


class _PairSlots(TypedDict):
    query_groups: Tensor
    target_groups: Tensor
    query_valid: Tensor
    target_valid: Tensor


def _pair_slots(rows: FeatureTable, candidates: FeatureTable, pair: Pair) -> _PairSlots:
    """Groups of rows and candidates, and which have both modalities."""
    query, target = pair_modalities(pair)
    return {
        "query_groups": rows.group_ids,
        "target_groups": candidates.group_ids,
        "query_valid": rows.present[query] & rows.present[target],
        "target_valid": candidates.present[query] & candidates.present[target],
    }


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
    scale, bias = (tensor.detach().float() for tensor in (logit_scale, logit_bias))
    candidate_grads = {name: torch.zeros_like(tensor) for name, tensor in candidates.features.items()}
    mine = ContrastiveGradients(
        {name: torch.zeros_like(tensor) for name, tensor in rows.features.items()},
        torch.zeros_like(scale),
        torch.zeros_like(bias),
        {pair: torch.zeros((), device=scale.device) for pair in config.pairs},
    )
    for pair in config.pairs:
        slots = _pair_slots(rows, candidates, pair)
        count = pair_count(candidates, pair).clamp(min=1)
        for weight, query, target in _directions(config.kind, pair):
            loss, grads = contrastive_loss(
                rows.features[query],
                candidates.features[target],
                scale,
                bias,
                kind=config.kind,
                symmetric=False,
                **slots,
                return_gradients=True,
            )
            share = config.weight / len(config.pairs) * weight / count
            mine.losses[pair] += loss * weight / count
            mine.features[query] += grads.queries * share
            candidate_grads[target] += grads.targets * share
            mine.logit_scale.add_(grads.logit_scale * share)
            mine.logit_bias.add_(grads.logit_bias * share)
    return candidate_grads, mine
