"""The arithmetic of the contrastive loss, one block of rows at a time, in plain torch.

Two sides, x and y, meet in logits s_ij = scale * x_i . y_j (+ bias for `sigmoid`). `ids` say which items are positives
of each other; a negative id marks a slot that is neither row nor candidate (-1 among queries, -2 among targets, so that
two of them never match), and its features are 0.

Statistics of the rows of x, one column per row (4 rows for infonce):

    shift     max_j s_ij over candidates (LOWEST where there is none)
    total     sum_j exp(s_ij - shift)
    positive  sum over positives of s_ij - shift
    count     number of positives

Everything is kept relative to the shift, so that a large common offset of the logits costs no precision. For `sigmoid`
there is one row of statistics: the losses.

Shapes: R rows (x), C candidates (y), E features. Accumulation: float32, float64 for float64 features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels.operands import without_autocast

LOWEST = -1e30  # a finite floor of `shift`: differences of two of them are 0, not NaN
# Logits of one block: 4 MiB in float32, where the passes over a block still find much of it in a CPU's cache. A block
# has at least so many rows, because a product of few rows reads all candidates for little work.
BLOCK_LOGITS = 2**20
LEAST_BLOCK_ROWS = 32


@dataclass(frozen=True)
class Pairing:
    """x (R, E) and y (C, E) of one dtype, their ids (R,) and (C,) int32, scale () and bias () or None, and the kind."""

    x: Tensor
    y: Tensor
    x_ids: Tensor
    y_ids: Tensor
    scale: Tensor
    bias: Tensor | None
    kind: str

    def exchanged(self) -> Pairing:
        """The other direction: rows are y's."""
        return replace(self, x=self.y, y=self.x, x_ids=self.y_ids, y_ids=self.x_ids)

    def widened(self) -> Pairing:
        """Everything in float32 (float64 stays)."""
        wide = torch.promote_types(self.x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return replace(self, x=self.x.to(wide), y=self.y.to(wide), scale=self.scale.to(wide), bias=bias)

    def is_empty(self) -> bool:
        return self.x.shape[0] == 0 or self.y.shape[0] == 0


@dataclass(frozen=True)
class SideGradients:
    """Gradients by x (R, E), by y (C, E) (None where not asked for), by scale () and bias ()."""

    x: Tensor
    y: Tensor | None
    scale: Tensor
    bias: Tensor


def statistics(pairing: Pairing, columns: bool = False) -> tuple[Tensor, Tensor]:
    """Statistics of the rows, (4, R) or for sigmoid (1, R), and where `columns` of the columns, (4, C), else (4, 0)."""
    p = pairing.widened()
    row_stats = empty_statistics(p.x, p.kind)
    column_stats = empty_statistics(p.y if columns else p.y[:0], "infonce")
    with without_autocast(p.x.device.type):
        for rows, logits, positive in _blocks(p):
            row_stats[:, rows] = _row_statistics(logits, positive, p.kind)
            if columns:
                found = _block_statistics(logits, positive, dim=0)
                column_stats = merge_statistics(torch.stack([column_stats, found]))
    return row_stats, column_stats


def empty_statistics(x: Tensor, kind: str) -> Tensor:
    """Statistics of rows that meet no candidate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    stats = x.new_zeros(1 if kind == "sigmoid" else 4, x.shape[0], dtype=wide)
    if kind != "sigmoid":
        stats[0] = LOWEST
    return stats


def merge_statistics(parts: Tensor) -> Tensor:
    """(K, 4, R) statistics over K disjoint sets of candidates -> (4, R) over all of them."""
    shift = parts[:, 0].amax(dim=0)
    moved = parts[:, 0] - shift
    total = (parts[:, 1] * moved.exp()).sum(dim=0)
    positive = (parts[:, 2] + parts[:, 3] * moved).sum(dim=0)
    return torch.stack([shift, total, positive, parts[:, 3].sum(dim=0)])


def loss_of(stats: Tensor, ids: Tensor, kind: str) -> Tensor:
    """() sum of the losses of the rows that are valid and, for infonce, have a positive."""
    if kind == "sigmoid":
        return stats[0].sum()
    _, total, positive, count = stats
    losses = total.log() - positive / count.clamp(min=1)
    return losses.where(_counts(stats, ids), 0).sum()


def part_of(stats: Tensor, ids: Tensor, weights: Tensor, kind: str) -> Tensor:
    """(3, R): shift, weight / total and weight / count of each row, from which a logit's gradient is made.

        d loss / d s_ij = exp(s_ij - shift_i) * weight_i / total_i - [j is a positive of i] * weight_i / count_i

    Rows without a loss have shift = inf and 0: they add exactly 0. For sigmoid only the weight, in the second place.
    """
    if kind == "sigmoid":
        nothing = torch.zeros_like(weights)
        return torch.stack([nothing, weights, nothing])
    shift, total, _, count = stats
    counts = _counts(stats, ids)
    return torch.stack(
        [shift.where(counts, torch.inf), (weights / total).where(counts, 0), (weights / count).where(counts, 0)]
    )


# (rows of the block, its logits, its positives) -> the block's (3, b) of `part_of`
RowPart = Callable[[slice, Tensor, Tensor], Tensor]


def gradients(
    pairing: Pairing, x_part: Tensor | RowPart | None, y_part: Tensor | None, want_y: bool = True
) -> SideGradients:
    """Gradients of the losses of the rows (`x_part`) and of the columns (`y_part`), None where they have none.

    Each logit is computed once; its gradient serves both sides.
    """
    p = pairing.widened()
    dx, dy = torch.zeros_like(p.x), torch.zeros_like(p.y) if want_y else None
    d_bias = p.x.new_zeros(())
    with without_autocast(p.x.device.type):
        for rows, logits, positive in _blocks(p):
            own = x_part(rows, logits, positive) if callable(x_part) else None if x_part is None else x_part[:, rows]
            grad = _logit_gradient(logits, positive, own, y_part, p.kind)
            if p.kind == "sigmoid":
                d_bias += grad.sum()
            torch.mm(grad, p.y, out=dx[rows])
            if dy is not None:
                dy.addmm_(grad.T, p.x[rows])
    d_scale = (dx * p.x).sum()  # sum_ij grad_ij * x_i . y_j without another pass over the blocks
    return SideGradients(dx.mul_(p.scale), None if dy is None else dy.mul_(p.scale), d_scale, d_bias)


def loss_and_gradients(pairing: Pairing) -> tuple[Tensor, SideGradients]:
    """Loss of the rows and its gradients in one pass: a block holds whole rows, so no logit is computed twice."""
    losses = [pairing.widened().x.new_zeros(())]

    def part_of_block(rows: slice, logits: Tensor, positive: Tensor) -> Tensor:
        stats, ids = _row_statistics(logits, positive, pairing.kind), pairing.x_ids[rows]
        losses.append(loss_of(stats, ids, pairing.kind))
        return part_of(stats, ids, torch.ones_like(stats[0]), pairing.kind)

    grads = gradients(pairing, part_of_block, None)
    return torch.stack(losses).sum(), grads


def _blocks(p: Pairing) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, logits (b, C), positive (b, C) bool) of every block; a logit is -inf where either slot is not in use."""
    if p.is_empty():
        return
    size = max(LEAST_BLOCK_ROWS, BLOCK_LOGITS // p.y.shape[0])
    for start in range(0, p.x.shape[0], size):
        rows = slice(start, start + size)
        logits = (p.x[rows] @ p.y.T).mul_(p.scale)
        if p.kind == "sigmoid" and p.bias is not None:
            logits += p.bias
        row_ids = p.x_ids[rows, None]
        # For sigmoid, too: -inf that is no positive has loss 0 and gradient 0.
        logits.masked_fill_((row_ids < 0) | (p.y_ids < 0), -torch.inf)
        yield rows, logits, row_ids == p.y_ids


def _row_statistics(logits: Tensor, positive: Tensor, kind: str) -> Tensor:
    if kind == "sigmoid":
        return F.logsigmoid(torch.where(positive, logits, -logits)).sum(dim=1, keepdim=True).neg_().T
    return _block_statistics(logits, positive, dim=1)


def _block_statistics(logits: Tensor, positive: Tensor, dim: int) -> Tensor:
    shift = logits.amax(dim=dim, keepdim=True).clamp_(min=LOWEST)
    shifted = logits - shift
    positive_sum = shifted.where(positive, 0).sum(dim=dim)
    total = shifted.exp_().sum(dim=dim)
    return torch.stack([shift.squeeze(dim), total, positive_sum, positive.sum(dim=dim, dtype=total.dtype)])


def _logit_gradient(
    logits: Tensor, positive: Tensor, x_part: Tensor | None, y_part: Tensor | None, kind: str
) -> Tensor:
    parts = [part[:, :, None] for part in (x_part,) if part is not None]
    parts += [part[:, None, :] for part in (y_part,) if part is not None]
    if kind == "sigmoid":
        # sigmoid(s) - 1 for a positive, sigmoid(s) for any other
        grad = torch.where(positive, -torch.sigmoid(-logits), torch.sigmoid(logits))
        return grad.mul_(parts[0][1])
    found = []
    for shift, over_total, over_count in parts:
        grad = (logits - shift).exp_().mul_(over_total)
        found.append(grad.sub_(over_count * positive))
    return found[0] if len(found) == 1 else found[0].add_(found[1])


def _counts(stats: Tensor, ids: Tensor) -> Tensor:
    return (ids >= 0) & (stats[3] > 0)
