"""Contrastive losses, InfoNCE and sigmoid, with several positives: the definition of correct, and good on a CPU.

Never more than one block of rows of logits lives at a time (`contrastive_blocks`); forward saves a few numbers per row,
backward computes each block again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trichord_kernels.operands import autocast_is_on
from trichord_kernels.reference import contrastive_blocks as blocks
from trichord_kernels.reference.contrastive_blocks import Pairing, SideGradients, part_of
from trichord_kernels.reference.contrastive_gradients import (
    ContrastiveGradients,
    as_given,
    direction_weight,
    has_columns,
    pair,
    total_loss,
)
from trichord_kernels.reference.contrastive_slots import Slots, check_operands

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "infonce",
    symmetric: bool = True,
    query_groups: Tensor | None = None,
    target_groups: Tensor | None = None,
    query_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_gradients: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveGradients]:
    """Shapes, dtypes, formulas and results as the public `trichord_kernels.contrastive_loss`; float64 is taken, too."""
    if autocast_is_on(queries.device.type):
        queries, targets = queries.float(), targets.float()
    slots = Slots(query_groups, target_groups, query_valid, target_valid)
    check_operands(queries, targets, logit_scale, logit_bias, kind, has_columns(kind, symmetric))
    slots.check(queries.shape[0], targets.shape[0], over_ranks=group is not None)
    operands = (*slots.without_unused(queries, targets), logit_scale, logit_bias)
    if group is not None:
        from trichord_kernels.reference.contrastive_ranks import loss_over_ranks

        return loss_over_ranks(_Blocks(), *operands, slots, kind, symmetric, group, return_gradients)
    ids = slots.ids(queries.shape[0], targets.shape[0], queries.device)
    if return_gradients:
        with torch.no_grad():
            return _loss_and_gradients(*operands, *ids, kind, symmetric)
    return _BlockedLoss.apply(*operands, *ids, kind, symmetric)


class _Blocks:
    """The plain-torch `contrastive_ranks.Primitives`."""

    def row_statistics(self, pairing: Pairing) -> Tensor:
        return blocks.statistics(pairing)[0]

    def row_gradients(
        self, pairing: Pairing, x_part: Tensor | None, y_part: Tensor | None, want_scalars: bool
    ) -> SideGradients:
        return blocks.gradients(pairing, x_part, y_part, want_y=False)


class _BlockedLoss(torch.autograd.Function):
    """Saves the statistics of rows (and columns); backward computes each block again and serves both sides from it."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        query_ids: Tensor,
        target_ids: Tensor,
        kind: str,
        symmetric: bool,
    ) -> Tensor:
        operands = (queries, targets, logit_scale, logit_bias, query_ids, target_ids)
        loss, query_stats, target_stats = forward_blocks(*operands, kind, symmetric)
        ctx.save_for_backward(*operands, query_stats, target_stats)
        ctx.kind, ctx.symmetric = kind, symmetric
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor):
        options = {"kind": ctx.kind, "symmetric": ctx.symmetric, "want_targets": ctx.needs_input_grad[1]}
        dq, dt, *scalars = backward_blocks(grad_loss, *ctx.saved_tensors, **options)
        return dq, dt if ctx.needs_input_grad[1] else None, *scalars, None, None, None, None


def forward_blocks(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    kind: str,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () and the statistics of queries, (4, R) or (1, R), and targets, (4, C) or (4, 0) without a loss."""
    pairing = pair(queries, targets, logit_scale, logit_bias, query_ids, target_ids, kind)
    query_stats, target_stats = blocks.statistics(pairing, has_columns(kind, symmetric))
    return total_loss(query_stats, target_stats, query_ids, target_ids, kind, symmetric), query_stats, target_stats


def backward_blocks(
    grad_loss: Tensor,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    query_stats: Tensor,
    target_stats: Tensor,
    kind: str,
    symmetric: bool,
    want_targets: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """grad_loss () times the gradients by queries, targets, logit_scale and logit_bias, in their shapes and dtypes."""
    pairing = pair(queries, targets, logit_scale, logit_bias, query_ids, target_ids, kind)
    query_part = part_of(query_stats, query_ids, torch.ones_like(query_stats[0]), kind)
    target_part = None
    if has_columns(kind, symmetric):
        target_part = part_of(target_stats, target_ids, torch.ones_like(target_stats[0]), kind)
    found = blocks.gradients(pairing, query_part, target_part, want_y=want_targets)
    return as_given(found, grad_loss * direction_weight(kind, symmetric), queries, targets, logit_scale, logit_bias)


def _loss_and_gradients(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    kind: str,
    symmetric: bool,
) -> tuple[Tensor, ContrastiveGradients]:
    operands = (queries, targets, logit_scale, logit_bias)
    if has_columns(kind, symmetric):
        slots = (query_ids, target_ids)
        loss, query_stats, target_stats = forward_blocks(*operands, *slots, kind, symmetric)
        one = torch.ones_like(loss)
        grads = backward_blocks(one, *operands, *slots, query_stats, target_stats, kind, symmetric)
        return loss, ContrastiveGradients.of(*grads)
    loss, found = blocks.loss_and_gradients(pair(*operands, query_ids, target_ids, kind))
    return loss, ContrastiveGradients.of(*as_given(found, torch.ones_like(loss), *operands))
