"""Linear map to the vocabulary and cross-entropy in one: the definition of correct, and the path of a CPU.

Shapes: T packed tokens, R rows of one chunk, D hidden, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trichord_kernels.operands import autocast_is_on, require_above_zero, require_not_negative, without_autocast
from trichord_kernels.reference.linear_cross_entropy_chunks import (
    LossOptions,
    Projection,
    gradients_in_chunks,
    losses_in_chunks,
    wide_dtype,
)

REDUCTIONS = ("none", "sum", "mean")
_BLOCK_LOGITS = 2**18  # logits worked on at once by the plain-torch row arithmetic: 1 MiB, what a core's cache holds


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_labelled: int | None = None,
) -> Tensor:
    """Loss of `hidden @ weight.T + bias`; arguments as the public `trichord_kernels.linear_cross_entropy`.

    s = softcap * tanh(logits / softcap), or the logits; m = max(s), l = log(sum(exp(s - m))), lse = m + l
    row loss = token weight * (l + (m - s[label]) - label_smoothing * mean(s - s[label]) + z_loss * lse^2)

    and 0 where the row has no label. Logits only enter as differences, so that an offset that all of them share costs
    no digits. float64 is allowed too and then stays float64. Rows without a label are dropped first, the others go in
    chunks whose logits are computed again in the backward pass: no more than one chunk of logits is ever held.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    check_operands(hidden, weight, labels, bias, options, token_weights, reduction, num_labelled)
    losses = _LinearCrossEntropy.apply(hidden, weight, labels, bias, options, num_labelled, compute_dtype_of(hidden))
    assert isinstance(losses, Tensor)
    return reduce_losses(losses, labels, ignore_index, token_weights, reduction)


def row_losses(logits: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """logits (R, V), labels (R,) -> loss, m and l of each row, (R,) float32 each. May overwrite `logits`."""
    found = []
    for block, label in _blocks(logits, labels):
        wide = block.to(wide_dtype(block))
        if options.softcap is not None:
            wide = wide.div_(options.softcap).tanh_().mul_(options.softcap)
        top = wide.amax(dim=1)
        wide = wide.sub_(top[:, None])
        target = wide.gather(1, label[:, None])[:, 0]
        mean = wide.mean(dim=1) if options.label_smoothing else target
        log_sum = wide.exp_().sum(dim=1).log()
        loss = log_sum - target - options.label_smoothing * (mean - target)
        found.append((loss + options.z_loss * (top + log_sum).square(), top, log_sum))
    loss, top, log_sum = (torch.cat(parts) for parts in zip(*found))
    return loss, top, log_sum


def logits_to_gradient(
    logits: Tensor, labels: Tensor, grad: Tensor, top: Tensor, log_sum: Tensor, options: LossOptions
) -> None:
    """Overwrite logits (R, V) with the gradient by them; grad (R,) is the one by the rows' losses."""
    for block, label, g, high, tail in _blocks(logits, labels, *(t[:, None] for t in (grad, top, log_sum))):
        wide, slope = block.to(wide_dtype(block)), None
        if options.softcap is not None:
            wide = wide.div_(options.softcap).tanh_()
            slope = 1 - wide.square()
            wide = wide.mul_(options.softcap)
        wide = wide.sub_(high).sub_(tail).exp_().mul_(g * (1 + 2 * options.z_loss * (high + tail)))
        if options.label_smoothing:
            wide = wide.sub_(g * (options.label_smoothing / logits.shape[1]))
        wide = wide.scatter_add_(1, label[:, None], g * (options.label_smoothing - 1))
        block.copy_(wide if slope is None else wide.mul_(slope))


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, _BLOCK_LOGITS // logits.shape[1])
    return zip(logits.split(rows), *(t.split(rows) for t in others))


class _LinearCrossEntropy(torch.autograd.Function):
    """Row losses (T,); the weight is saved as the Parameter itself, whose storage ZeRO-3 swaps."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, options, num_labelled, dtype):
        order = labelled_rows(labels, options.ignore_index, num_labelled)
        check_labels(labels if order is None else labels[order], weight.shape[0])
        with without_autocast(hidden.device.type):
            projection = Projection.of(hidden, weight, bias, order, dtype)
            losses, statistics = losses_in_chunks(projection, labels, options, row_losses)
        ctx.save_for_backward(hidden, weight, labels, bias, order, statistics)
        ctx.options, ctx.dtype = options, dtype
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_losses):
        hidden, weight, labels, bias, order, statistics = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with without_autocast(hidden.device.type):
            projection = Projection.of(hidden, weight, bias, order, ctx.dtype)
            grads = gradients_in_chunks(
                projection, labels, grad_losses, statistics, ctx.options, needed, logits_to_gradient
            )
        grad_hidden, grad_weight, grad_bias = (
            None if grad is None else grad.to(t.dtype) for grad, t in zip(grads, (hidden, weight, bias))
        )
        return grad_hidden, grad_weight, None, grad_bias, None, None, None


def compute_dtype_of(hidden: Tensor) -> torch.dtype | None:
    """What torch's own linear would compute in: autocast's dtype where it is on (float64 stays), else None."""
    device_type = hidden.device.type
    if hidden.dtype == torch.float64 or not autocast_is_on(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def labelled_rows(labels: Tensor, ignore_index: int, num_labelled: int | None) -> Tensor | None:
    """Rows that carry a label, in order, (K,) int64; None where that is all of them. Waits for the device."""
    order = (labels != ignore_index).nonzero()[:, 0]
    if num_labelled is not None and num_labelled < order.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: expected num_labelled of at least the number of labelled rows, got {num_labelled} "
            f"for {order.shape[0]} rows with a label; count `labels != ignore_index`, or leave it out"
        )
    return None if order.shape[0] == labels.shape[0] else order


def check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise ValueError for a label (of the rows that carry one) that is no row of the weight. Waits for the device."""
    if labels.numel():
        for value in (int(labels.amin()), int(labels.amax())):
            if not 0 <= value < vocab_size:
                raise ValueError(
                    f"linear_cross_entropy: expected labels in 0..{vocab_size - 1} (V = {vocab_size} rows of weight) "
                    f"or ignore_index, got {value}; check the tokenizer's size against the head's"
                )


def reduce_losses(
    losses: Tensor, labels: Tensor, ignore_index: int, token_weights: Tensor | None, reduction: str
) -> Tensor:
    """Row losses (T,) -> the loss: weights, then the sum or the mean over the weights of rows with a label."""
    labelled = labels != ignore_index
    if token_weights is not None:  # unlabelled rows may hold anything there
        token_weights = torch.where(labelled, token_weights.to(losses.dtype), 0.0)
        losses = losses * token_weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if token_weights is None:
        return losses.sum() / labelled.sum().clamp(min=1)
    return losses.sum() / token_weights.sum().clamp(min=torch.finfo(losses.dtype).tiny)


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    token_weights: Tensor | None,
    reduction: str,
    num_labelled: int | None,
) -> None:
    """Raise ValueError unless shapes, dtypes and options fit together (both paths refuse the same mistakes)."""
    name = "linear_cross_entropy: expected"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(
            f"{name} hidden (T, D) and weight (V, D), V >= 1, got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "flatten the batch and pass the head's own weight"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"{name} labels ({hidden.shape[0]},) int64, one per row of hidden, got {tuple(labels.shape)} "
            f"{labels.dtype}; shift and flatten them, and cast with .long()"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name} bias ({weight.shape[0]},), got {tuple(bias.shape)}; pass the head's own bias")
    dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
    if compute_dtype_of(hidden) is None and len(dtypes) != 1:
        raise ValueError(
            f"{name} hidden, weight and bias of one dtype, got {', '.join(sorted(map(str, dtypes)))}; cast, or use "
            "torch.autocast"
        )
    if token_weights is not None and (token_weights.shape != labels.shape or not token_weights.is_floating_point()):
        raise ValueError(
            f"{name} token_weights ({labels.shape[0]},) of a floating dtype, got {tuple(token_weights.shape)} "
            f"{token_weights.dtype}; give one weight per row"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name} reduction of {', '.join(REDUCTIONS)}, got {reduction!r}; use one of these")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"{name} label_smoothing in 0..1, got {options.label_smoothing}; 0 turns it off")
    require_above_zero("linear_cross_entropy", softcap=options.softcap)
    require_not_negative("linear_cross_entropy", z_loss=options.z_loss)
    if num_labelled is not None and num_labelled < 0:
        raise ValueError(f"{name} num_labelled of at least 0, got {num_labelled}; None: not known to the host")
