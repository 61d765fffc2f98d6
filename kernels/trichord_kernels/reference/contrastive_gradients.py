"""What both paths of the contrastive loss make of their statistics and gradients: the loss, results as asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trichord_kernels.reference.contrastive_blocks import Pairing, SideGradients, loss_of


@dataclass(frozen=True)
class ContrastiveGradients:
    """Gradients of the loss (with a process group: of the sum of all ranks' losses).

    queries (R, E), targets (C, E): by this rank's own features, in their dtype; logit_scale, logit_bias: in the shape
    and dtype of the scalars, whole (summed over ranks); logit_bias () 0 where none was given.
    """

    queries: Tensor
    targets: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    @classmethod
    def of(
        cls, queries: Tensor, targets: Tensor, logit_scale: Tensor, logit_bias: Tensor | None
    ) -> ContrastiveGradients:
        """From what `as_given` returns."""
        return cls(queries, targets, logit_scale, logit_scale.new_zeros(()) if logit_bias is None else logit_bias)


def pair(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    query_ids: Tensor,
    target_ids: Tensor,
    kind: str,
) -> Pairing:
    """Queries as rows, targets as columns, scalars ()."""
    bias = None if logit_bias is None else logit_bias.reshape(())
    return Pairing(queries, targets, query_ids, target_ids, logit_scale.reshape(()), bias, kind)


def has_columns(kind: str, symmetric: bool) -> bool:
    """Whether the targets have losses of their own. Sigmoid covers every pair once as it is."""
    return symmetric and kind == "infonce"


def direction_weight(kind: str, symmetric: bool) -> float:
    """Of each direction's losses in the sum."""
    return 0.5 if has_columns(kind, symmetric) else 1.0


def total_loss(
    query_stats: Tensor, target_stats: Tensor, query_ids: Tensor, target_ids: Tensor, kind: str, symmetric: bool
) -> Tensor:
    """() loss of the queries and, where they have one, of the targets."""
    loss = loss_of(query_stats, query_ids, kind)
    return 0.5 * (loss + loss_of(target_stats, target_ids, kind)) if has_columns(kind, symmetric) else loss


def as_given(
    found: SideGradients,
    factor: Tensor,
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients times `factor` in the shapes and dtypes of their operands; of targets not asked for: (0,)."""
    return (
        (found.x * factor).to(queries.dtype),
        targets.new_empty(0) if found.y is None else (found.y * factor).to(targets.dtype),
        (found.scale * factor).to(logit_scale.dtype).reshape(logit_scale.shape),
        None if logit_bias is None else (found.bias * factor).to(logit_bias.dtype).reshape(logit_bias.shape),
    )
