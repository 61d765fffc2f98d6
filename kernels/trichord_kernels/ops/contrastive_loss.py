"""Contrastive loss: the two Triton kernels joined to a loss and its gradients, registered as two torch ops.

Forward: one launch per direction that has a loss. Backward: one launch per side that wants a gradient. In units of one
product of all queries with all targets, 2 R C E FLOPs, for features that are held whole (tables/contrastive_loss.py):

    symmetric infonce   2 forward + 4 backward      dense: 1 + 2
    one direction       1 forward + 4 backward
    sigmoid             1 forward + 4 backward

and E / block_out - 1 more per side in the backward for longer features, whose logits each program computes again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trichord_kernels.dispatch import choose_backend
from trichord_kernels.operands import autocast_is_on
from trichord_kernels.ops.contrastive_loss_backward import row_gradients
from trichord_kernels.ops.contrastive_loss_forward import row_statistics
from trichord_kernels.ops.launch import check_row_operands
from trichord_kernels.reference.contrastive_blocks import Pairing, SideGradients, part_of
from trichord_kernels.reference.contrastive_gradients import (
    ContrastiveGradients,
    as_given,
    direction_weight,
    has_columns,
    pair,
    total_loss,
)
from trichord_kernels.reference.contrastive_loss import backward_blocks, forward_blocks
from trichord_kernels.reference.contrastive_slots import Slots, check_operands

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Kernels:
    """The Triton `contrastive_ranks.Primitives`."""

    def row_statistics(self, pairing: Pairing) -> Tensor:
        _check(pairing.x, pairing.y, pairing.scale, pairing.bias)
        return row_statistics(pairing)

    def row_gradients(
        self, pairing: Pairing, x_part: Tensor | None, y_part: Tensor | None, want_scalars: bool
    ) -> SideGradients:
        return row_gradients(pairing, x_part, y_part, want_scalars)


@torch.library.custom_op("trichord::contrastive_loss_forward", mutates_args=())
def contrastive_loss_forward(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    kind: str,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss () and the statistics of queries, (4, R) or (1, R), and targets, (4, C) where they have a loss, else (4, 0).

    Features of slots that are not in use (negative ids) must be 0.
    """
    if choose_backend(queries.device) == "reference":  # a compiled graph on a CPU
        return forward_blocks(queries, targets, logit_scale, logit_bias, query_ids, target_ids, kind, symmetric)
    _check(queries, targets, logit_scale, logit_bias)
    pairing = pair(queries, targets, logit_scale, logit_bias, query_ids, target_ids, kind)
    query_stats = row_statistics(pairing)
    target_stats = query_stats.new_empty(4, 0)
    if has_columns(kind, symmetric):
        target_stats = row_statistics(pairing.exchanged())
    return total_loss(query_stats, target_stats, query_ids, target_ids, kind, symmetric), query_stats, target_stats


@torch.library.custom_op("trichord::contrastive_loss_backward", mutates_args=())
def contrastive_loss_backward(
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
    want_queries: bool,
    want_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by queries, targets, logit_scale and logit_bias; (0,) for a side not wanted or a bias not given."""
    operands = (queries, targets, logit_scale, logit_bias)
    if choose_backend(queries.device) == "reference":
        stats = (query_ids, target_ids, query_stats, target_stats)
        dq, dt, d_scale, d_bias = backward_blocks(grad_loss, *operands, *stats, kind, symmetric, want_targets)
        return dq if want_queries else queries.new_empty(0), dt, d_scale, _or_nothing(d_bias, logit_scale)
    pairing = pair(*operands, query_ids, target_ids, kind)
    query_part = part_of(query_stats, query_ids, torch.ones_like(query_stats[0]), kind)
    target_part = None
    if has_columns(kind, symmetric):
        target_part = part_of(target_stats, target_ids, torch.ones_like(target_stats[0]), kind)
    # Either side meets every pair, so the first one gives the scalars' gradients.
    by_target = by_query = None
    if want_queries or not want_targets:
        by_query = row_gradients(pairing, query_part, target_part)
    if want_targets:
        by_target = row_gradients(pairing.exchanged(), target_part, query_part, want_scalars=by_query is None)
    return _gathered(by_query, by_target, grad_loss * direction_weight(kind, symmetric), want_queries, *operands)


def _gathered(
    by_query: SideGradients | None,
    by_target: SideGradients | None,
    factor: Tensor,
    want_queries: bool,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalars = by_query or by_target
    assert scalars is not None
    dx = by_query.x if by_query is not None and want_queries else queries.new_empty(0)
    found = SideGradients(dx, None if by_target is None else by_target.x, scalars.scale, scalars.bias)
    dq, dt, d_scale, d_bias = as_given(found, factor, queries, targets, logit_scale, logit_bias)
    return dq, dt, d_scale, _or_nothing(d_bias, logit_scale)


def _or_nothing(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if grad is None else grad


def _check(queries: Tensor, targets: Tensor, logit_scale: Tensor, logit_bias: Tensor | None) -> None:
    check_row_operands("contrastive_loss", queries, targets, logit_scale, logit_bias)


@contrastive_loss_forward.register_fake
def _forward_fake(queries, targets, logit_scale, logit_bias, query_ids, target_ids, kind, symmetric):
    if choose_backend(queries.device) == "triton":
        _check(queries, targets, logit_scale, logit_bias)
    wide = torch.promote_types(queries.dtype, torch.float32)
    num_stats, num_columns = (1 if kind == "sigmoid" else 4), (targets.shape[0] if has_columns(kind, symmetric) else 0)
    return (
        queries.new_empty((), dtype=wide),
        queries.new_empty((num_stats, queries.shape[0]), dtype=wide),
        queries.new_empty((4, num_columns), dtype=wide),
    )


@contrastive_loss_backward.register_fake
def _backward_fake(
    grad_loss,
    queries,
    targets,
    logit_scale,
    logit_bias,
    query_ids,
    target_ids,
    query_stats,
    target_stats,
    kind,
    symmetric,
    want_queries,
    want_targets,
):
    return (
        queries.new_empty(queries.shape if want_queries else (0,)),
        targets.new_empty(targets.shape if want_targets else (0,)),
        logit_scale.new_empty(logit_scale.shape),
        logit_scale.new_empty(0) if logit_bias is None else logit_bias.new_empty(logit_bias.shape),
    )


def _save_for_backward(ctx, inputs, output) -> None:
    *operands, kind, symmetric = inputs
    # The scalars themselves, not a view or a copy: under ZeRO-3 a Parameter's storage is swapped before backward.
    ctx.save_for_backward(*operands, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.kind, ctx.symmetric = kind, symmetric
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss: Tensor | None, *_):
    if grad_loss is None:
        return (None,) * 8
    want = [bool(needed) for needed in ctx.needs_input_grad[:4]]
    grads = contrastive_loss_backward(grad_loss, *ctx.saved_tensors, ctx.kind, ctx.symmetric, want[0], want[1])
    return *(grad if wanted else None for grad, wanted in zip(grads, want)), None, None, None, None


contrastive_loss_forward.register_autograd(_backward, setup_context=_save_for_backward)
# float32 is torch's own policy for losses under autocast.
for _device_type in ("cuda", "cpu"):
    contrastive_loss_forward.register_autocast(_device_type, torch.float32)


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
    """The Triton path of `trichord_kernels.contrastive_loss`, which documents it."""
    if autocast_is_on(queries.device.type):
        queries, targets = queries.float(), targets.float()
    slots = Slots(query_groups, target_groups, query_valid, target_valid)
    check_operands(queries, targets, logit_scale, logit_bias, kind, has_columns(kind, symmetric))
    slots.check(queries.shape[0], targets.shape[0], over_ranks=group is not None)
    operands = (*slots.without_unused(queries, targets), logit_scale, logit_bias)
    if group is not None:
        from trichord_kernels.reference.contrastive_ranks import loss_over_ranks

        return loss_over_ranks(_Kernels(), *operands, slots, kind, symmetric, group, return_gradients)
    ids = slots.ids(queries.shape[0], targets.shape[0], queries.device)
    if not return_gradients:
        return contrastive_loss_forward(*operands, *ids, kind, symmetric)[0]
    with torch.no_grad():
        loss, *stats = contrastive_loss_forward(*operands, *ids, kind, symmetric)
        grads = contrastive_loss_backward(
            torch.ones_like(loss), *operands, *ids, *stats, kind, symmetric, want_queries=True, want_targets=True
        )
    dq, dt, d_scale, d_bias = grads
    return loss, ContrastiveGradients.of(dq, dt, d_scale, None if logit_bias is None else d_bias)
