"""The contrastive loss over the candidates of all ranks of a process group.

Features and ids of all ranks are gathered once. Each rank has the losses of its own queries and targets, so forward
pairs its own rows with everyone's. For backward the ranks exchange the statistics of their rows (a few numbers each):
with those a rank computes the whole gradient of its own features from its own rows of logits, so no gradient by
candidate, (ranks x R, E), is ever made or reduced. Per rank and direction: R x (ranks x R) logits forward and as many
in backward for each side. The collectives are all-gathers only, so every sum has one order.

Written once for both paths: `Primitives` are the plain-torch blocks or the Triton kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trichord_kernels.reference.contrastive_blocks import Pairing, SideGradients, part_of
from trichord_kernels.reference.contrastive_gradients import (
    ContrastiveGradients,
    as_given,
    direction_weight,
    has_columns,
    total_loss,
)
from trichord_kernels.reference.contrastive_slots import Slots

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Its name since torch 2.14, which warns of the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Primitives(Protocol):
    """What a path computes for rows x against candidates y."""

    def row_statistics(self, pairing: Pairing) -> Tensor:
        """(4, R) or (1, R), see `contrastive_blocks`."""
        ...

    def row_gradients(
        self, pairing: Pairing, x_part: Tensor | None, y_part: Tensor | None, want_scalars: bool
    ) -> SideGradients:
        """Gradients by x (and by the scalars, if wanted) of the losses of rows (`x_part`) and candidates (`y_part`)."""
        ...


@dataclass(frozen=True)
class Everyone:
    """What is the same for all steps: whose candidates, which loss, by what means."""

    primitives: Primitives
    group: ProcessGroup
    kind: str
    symmetric: bool

    def own(self, gathered: Tensor, num_rows: int, dim: int = 0) -> Tensor:
        return gathered.narrow(dim, dist.get_rank(self.group) * num_rows, num_rows)

    def gather(self, own: Tensor) -> Tensor:
        """(n, ...) of every rank below each other, in rank order: (ranks * n, ...)."""
        ranks = dist.get_world_size(self.group)
        gathered = own.new_empty(ranks * own.shape[0], *own.shape[1:])
        _all_gather(gathered, own.contiguous(), group=self.group)
        return gathered


def loss_over_ranks(
    primitives: Primitives,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    slots: Slots,
    kind: str,
    symmetric: bool,
    group: ProcessGroup,
    return_gradients: bool,
) -> Tensor | tuple[Tensor, ContrastiveGradients]:
    """This rank's loss; all ranks call it, with equal R and equal C, and all call backward (or all do not).

    Features of slots that are not in use are 0 here. Gradients by the features are whole. The scalars are one leaf per
    rank: autograd gives each rank its rows' share (data parallelism sums or averages parameters' gradients over ranks);
    `return_gradients` gives the sum.
    """
    everyone = Everyone(primitives, group, kind, symmetric)
    ids = _gathered_ids(everyone, slots, queries.shape[0], targets.shape[0], queries.device)
    if not return_gradients:
        return _RanksLoss.apply(queries, targets, logit_scale, logit_bias, *ids, everyone)
    with torch.no_grad():
        operands = (queries, targets, logit_scale, logit_bias)
        loss, *saved = _forward(everyone, *operands, *ids)
        grads = _backward(everyone, torch.ones_like(loss), *operands, *ids, *saved)
        scalars = everyone.gather(torch.stack([grads.scale, grads.bias])[None]).sum(dim=0)
        whole = SideGradients(grads.x, grads.y, *scalars)
        return loss, ContrastiveGradients.of(*as_given(whole, torch.ones_like(loss), *operands))


class _RanksLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        query_ids: Tensor,
        target_ids: Tensor,
        everyone: Everyone,
    ) -> Tensor:
        operands = (queries, targets, logit_scale, logit_bias, query_ids, target_ids)
        loss, *saved = _forward(everyone, *operands)
        ctx.save_for_backward(*operands, *saved)
        ctx.everyone = everyone
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor):
        grads = _backward(ctx.everyone, grad_loss, *ctx.saved_tensors)
        return *as_given(grads, torch.ones_like(grad_loss), *ctx.saved_tensors[:4]), None, None, None


def _gathered_ids(
    everyone: Everyone, slots: Slots, num_queries: int, num_targets: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Ids of the slots of all ranks, numbered alike on all of them."""
    numbers = [torch.zeros(n, dtype=torch.int64, device=device) for n in (num_queries, num_targets)]
    groups = [zeros if own is None else own for zeros, own in zip(numbers, (slots.query_groups, slots.target_groups))]
    valid = [
        zeros + 1 if own is None else own.long() for zeros, own in zip(numbers, (slots.query_valid, slots.target_valid))
    ]
    facts = everyone.gather(torch.stack([torch.cat(groups), torch.cat(valid)], dim=1))
    query_facts, target_facts = facts.unflatten(0, (-1, num_queries + num_targets)).split([num_queries, num_targets], 1)
    query_facts, target_facts = query_facts.reshape(-1, 2), target_facts.reshape(-1, 2)
    has_groups = slots.query_groups is not None
    return Slots(
        query_facts[:, 0] if has_groups else None,
        target_facts[:, 0] if has_groups else None,
        query_facts[:, 1].bool(),
        target_facts[:, 1].bool(),
    ).ids(query_facts.shape[0], target_facts.shape[0], device)


def _forward(
    everyone: Everyone,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, the features of all ranks, and the statistics of this rank's queries and targets."""
    all_queries, all_targets = everyone.gather(queries), everyone.gather(targets)
    own_query_ids = everyone.own(query_ids, queries.shape[0])
    own_target_ids = everyone.own(target_ids, targets.shape[0])
    scalars = (logit_scale.reshape(()), None if logit_bias is None else logit_bias.reshape(()), everyone.kind)
    by_query = Pairing(queries, all_targets, own_query_ids, target_ids, *scalars)
    query_stats = everyone.primitives.row_statistics(by_query)
    target_stats = query_stats.new_empty(4, 0)
    if has_columns(everyone.kind, everyone.symmetric):
        by_target = Pairing(targets, all_queries, own_target_ids, query_ids, *scalars)
        target_stats = everyone.primitives.row_statistics(by_target)
    loss = total_loss(query_stats, target_stats, own_query_ids, own_target_ids, everyone.kind, everyone.symmetric)
    return loss, all_queries, all_targets, query_stats, target_stats


def _backward(
    everyone: Everyone,
    grad_loss: Tensor,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    all_queries: Tensor,
    all_targets: Tensor,
    query_stats: Tensor,
    target_stats: Tensor,
) -> SideGradients:
    """Gradients by this rank's queries (x) and targets (y), and its rows' share of those by scale and bias."""
    R, C = queries.shape[0], targets.shape[0]
    query_part, target_part, factor = _parts_of_all(
        everyone, grad_loss, query_stats, target_stats, query_ids, target_ids
    )
    scalars = (logit_scale.reshape(()), None if logit_bias is None else logit_bias.reshape(()), everyone.kind)
    by_query = Pairing(queries, all_targets, everyone.own(query_ids, R), target_ids, *scalars)
    by_target = Pairing(targets, all_queries, everyone.own(target_ids, C), query_ids, *scalars)
    own_target_part = None if target_part is None else everyone.own(target_part, C, dim=1)
    rows = everyone.primitives.row_gradients(by_query, everyone.own(query_part, R, dim=1), target_part, True)
    columns = everyone.primitives.row_gradients(by_target, own_target_part, query_part, False)
    return SideGradients(rows.x * factor, columns.x * factor, rows.scale * factor, rows.bias * factor)


def _parts_of_all(
    everyone: Everyone,
    grad_loss: Tensor,
    query_stats: Tensor,
    target_stats: Tensor,
    query_ids: Tensor,
    target_ids: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`part_of` for the queries and targets of all ranks, weighted by their rank's grad_loss over the largest of them,
    and that largest one (with the weight of a direction) as a factor. One all-gather."""
    shapes = query_stats.shape, target_stats.shape
    message = torch.cat([grad_loss.reshape(1).to(query_stats.dtype), query_stats.flatten(), target_stats.flatten()])
    messages = everyone.gather(message[None])
    weights = messages[:, 0]
    largest = weights.abs().max()
    weights = weights / torch.where(largest > 0, largest, 1)
    of_queries, of_targets = messages[:, 1:].split([shapes[0].numel(), shapes[1].numel()], dim=1)

    def part(flat: Tensor, shape: torch.Size, ids: Tensor) -> Tensor:
        stats = flat.unflatten(1, shape).transpose(0, 1).flatten(1)  # (4, ranks * R)
        return part_of(stats, ids, weights.repeat_interleave(shape[1]), everyone.kind)

    target_part = part(of_targets, shapes[1], target_ids) if has_columns(everyone.kind, everyone.symmetric) else None
    factor = largest * direction_weight(everyone.kind, everyone.symmetric)
    return part(of_queries, shapes[0], query_ids), target_part, factor
