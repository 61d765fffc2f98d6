"""The chunks of linear_cross_entropy, for both paths: matrix products around the row arithmetic that a path brings.

Shapes: T packed tokens, K rows that are visited, R rows of one chunk, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trichord_kernels.tables.linear_cross_entropy import chunk_rows
from trichord_kernels.tables.tile import arch_of


@dataclass(frozen=True)
class LossOptions:
    """What the loss of a row is made of; see `linear_cross_entropy`."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None


def wide_dtype(t: Tensor) -> torch.dtype:
    """float32, or t's own where that is wider: what sums and row arithmetic run in."""
    return torch.promote_types(t.dtype, torch.float32)


RowLosses = Callable[[Tensor, Tensor, LossOptions], tuple[Tensor, Tensor, Tensor]]
LogitsToGradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, LossOptions], None]


@dataclass(frozen=True)
class Projection:
    """The operands of the matrix products. `order`: the rows to visit (K,) int64, None for all in turn.

    row_multiple: rows of the logits buffer start at multiples of so many elements. all_labelled: every row that is
    visited has a label; else those without one may hold anything and count for nothing.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    order: Tensor | None
    row_multiple: int = 1
    all_labelled: bool = True

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        order: Tensor | None,
        dtype: torch.dtype | None,
        row_multiple: int = 1,
        all_labelled: bool = True,
    ) -> Projection:
        """The operands in the dtype that the products run in (None: their own)."""
        dtype = dtype or hidden.dtype
        bias = None if bias is None else bias.to(dtype)
        return cls(hidden.to(dtype), weight.to(dtype), bias, order, row_multiple, all_labelled)

    def chunks(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        """Per chunk: which rows, their hidden states (R, D), their logits (R, V), valid until the next one."""
        num_rows = self.hidden.shape[0] if self.order is None else self.order.shape[0]
        vocab_size = self.weight.shape[0]
        width = -(-vocab_size // self.row_multiple) * self.row_multiple
        rows = chunk_rows(arch_of(self.hidden.device), num_rows, width * self.hidden.element_size())
        buffer = self.hidden.new_empty((min(rows, num_rows), width))
        for start in range(0, num_rows, rows):
            index = slice(start, start + rows) if self.order is None else self.order[start : start + rows]
            x = self.hidden[index]
            logits = buffer[: x.shape[0], :vocab_size]
            if self.bias is None:
                torch.mm(x, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=logits)
            yield index, x, logits


def losses_in_chunks(
    projection: Projection, labels: Tensor, options: LossOptions, losses_of: RowLosses
) -> tuple[Tensor, Tensor]:
    """losses (T,), and what the backward needs of each row, (2, T): its maximum m and l. Rows not visited: 0."""
    num_tokens = labels.shape[0]
    losses = projection.hidden.new_zeros(num_tokens, dtype=wide_dtype(projection.hidden))
    statistics = losses.new_zeros((2, num_tokens))
    for index, _, logits in projection.chunks():
        losses[index], statistics[0, index], statistics[1, index] = losses_of(logits, labels[index], options)
    return losses, statistics


def gradients_in_chunks(
    projection: Projection,
    labels: Tensor,
    grad_losses: Tensor,
    statistics: Tensor,
    options: LossOptions,
    needed: tuple[bool, bool, bool],
    to_gradient: LogitsToGradient,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_hidden in hidden's dtype, d_weight and d_bias summed in float32, each where `needed`."""
    hidden, weight = projection.hidden, projection.weight
    grad_hidden = hidden.new_zeros(hidden.shape) if needed[0] else None
    grad_weight = weight.new_zeros(weight.shape, dtype=wide_dtype(weight)) if needed[1] else None
    grad_bias = weight.new_zeros(weight.shape[0], dtype=wide_dtype(weight)) if needed[2] else None
    for index, x, logits in projection.chunks():
        to_gradient(logits, labels[index], grad_losses[index], statistics[0, index], statistics[1, index], options)
        if grad_hidden is not None:
            grad_hidden[index] = torch.mm(logits, weight)
        if grad_weight is not None:
            if not projection.all_labelled:  # 0 times NaN is not 0
                x = x.masked_fill((labels[index] == options.ignore_index)[:, None], 0.0)
            add_product(grad_weight, logits.t(), x)
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0, dtype=grad_bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b with the product in total's dtype, whatever the dtype of a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
