"""Linear map to the vocabulary and cross-entropy in one: Triton row kernels between torch's matrix products.

Per chunk of rows: logits = x @ weight.T + bias by torch.mm in the operands' dtype, then a program per row, in float32:

    s = softcap * tanh(logits / softcap), or the logits
    m = max(s); l = log(sum(exp(s - m))); lse = m + l
    loss = l + (m - s[label]) - label_smoothing * mean(s - s[label]) + z_loss * lse^2

Backward: the chunk's logits are computed again and turned in place into their gradient, with g = d_loss of the row:

    p = exp((s - m) - l)
    d_s = g * ((1 + 2 * z_loss * lse) * p - label_smoothing / V - (1 - label_smoothing) * [column == label])
    d_logits = d_s * (1 - (s / softcap)^2)      rounded to the operands' dtype

and d_x = d_logits @ weight, d_weight += d_logits.T @ x, the sum over chunks in float32. Between forward and backward
only m and l of each row live, apart: their sum would round l away where all logits share a large offset. Chunks of
logits follow Liger-Kernel (Hsu et al. 2024, arXiv 2410.10989), recomputing them in the backward Cut Your Losses
(Wijmans et al. 2024, arXiv 2411.09009).
"""

# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels.dispatch import choose_backend
from trichord_kernels.errors import KernelError
from trichord_kernels.ops.launch import KERNEL_DTYPES, on_device
from trichord_kernels.reference.linear_cross_entropy import (
    check_labels,
    check_operands,
    compute_dtype_of,
    labelled_rows,
    logits_to_gradient,
    reduce_losses,
    row_losses,
)
from trichord_kernels.reference.linear_cross_entropy_chunks import (
    LossOptions,
    Projection,
    gradients_in_chunks,
    losses_in_chunks,
    wide_dtype,
)
from trichord_kernels.tables.linear_cross_entropy import row_tile
from trichord_kernels.tables.tile import arch_of

# Rows of the logits buffer start at multiples of 8 elements, 16 bytes in half precision: an odd vocabulary would
# otherwise be read and written element by element.
ROW_MULTIPLE = 8


@triton.jit
def _tanh(x):
    """tanh to float32's precision everywhere: its series where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _linear_cross_entropy_forward_kernel(
    Logits_ptr,
    Labels_ptr,
    Loss_ptr,
    Max_ptr,
    Log_sum_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    num_columns,
    V: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Loss, m and l of one row; 0 for ignore_index, NaN for any other label outside the vocabulary.

    Each lane keeps its own running maximum and sum over WIDTH neighbouring columns per turn, so that the loop has no
    exchange between threads; lanes are joined behind it.
    """
    PADDED: tl.constexpr = (V + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    base = Logits_ptr + row * PADDED
    label = tl.load(Labels_ptr + row)
    labelled = label != ignore_index
    is_token = (label >= 0) & (label < V)
    target = tl.load(base + label, mask=labelled & is_token, other=float("nan")).to(tl.float32)
    if HAS_SOFTCAP:
        target = softcap * _tanh(target / softcap)
    lane_max = tl.full((LANES,), -3.4028234663852886e38, tl.float32)  # finite: logits of -inf are exp(-inf) below it
    lane_sum = tl.zeros((LANES,), tl.float32)
    lane_total = tl.zeros((LANES,), tl.float32)
    in_tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(0, tl.where(labelled, num_columns, 0), LANES * WIDTH):
        cols = start + in_tile
        s = tl.load(base + cols, mask=cols < PADDED, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            s = softcap * _tanh(s / softcap)
        if HAS_SMOOTHING:
            lane_total += tl.sum(tl.where(cols < V, s - target, 0.0), axis=1)
        s = tl.where(cols < V, s, -float("inf"))
        new_max = tl.maximum(lane_max, tl.max(s, axis=1))
        lane_sum = lane_sum * tl.exp(lane_max - new_max) + tl.sum(tl.exp(s - new_max[:, None]), axis=1)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    log_sum = tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), axis=0))
    log_sum = tl.where(is_token, log_sum, float("nan"))
    lse = row_max + log_sum
    loss = log_sum + (row_max - target) + z_loss * lse * lse
    if HAS_SMOOTHING:
        loss -= label_smoothing * (tl.sum(lane_total, axis=0) / V)
    tl.store(Loss_ptr + row, tl.where(labelled, loss, 0.0))
    tl.store(Max_ptr + row, tl.where(labelled, row_max, 0.0))
    tl.store(Log_sum_ptr + row, tl.where(labelled, log_sum, 0.0))


@triton.jit
def _linear_cross_entropy_backward_kernel(
    Logits_ptr,
    Labels_ptr,
    Grad_ptr,
    Max_ptr,
    Log_sum_ptr,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    num_columns,
    V: tl.constexpr,
    ROW_MULTIPLE: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """One row of logits becomes its gradient, in place: each thread reads only what it overwrites."""
    PADDED: tl.constexpr = (V + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    row = tl.program_id(0).to(tl.int64)
    base = Logits_ptr + row * PADDED
    label = tl.load(Labels_ptr + row)
    labelled = label != ignore_index
    grad = tl.load(Grad_ptr + row)
    row_max = tl.load(Max_ptr + row)
    log_sum = tl.load(Log_sum_ptr + row)
    factor = grad * (1.0 + 2.0 * z_loss * (row_max + log_sum))
    spread = grad * (label_smoothing / V)
    hit = grad * (1.0 - label_smoothing)
    in_tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for start in range(0, num_columns, LANES * WIDTH):
        cols = start + in_tile
        s = tl.load(base + cols, mask=cols < PADDED, other=0.0)
        dtype = s.dtype
        s = s.to(tl.float32)
        slope = 1.0
        if HAS_SOFTCAP:
            capped = _tanh(s / softcap)
            s = softcap * capped
            slope = 1.0 - capped * capped
        d = factor * tl.exp((s - row_max) - log_sum)
        if HAS_SMOOTHING:
            d -= spread
        d = tl.where(cols == label, d - hit, d)
        if HAS_SOFTCAP:
            d *= slope
        # A row without a label may hold anything, its incoming gradient too.
        tl.store(base + cols, tl.where(labelled, d, 0.0).to(dtype), mask=cols < PADDED)


def _row_losses(logits: Tensor, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel on logits (R, V) of a padded buffer: loss, m and l, (R,) float32 each."""
    loss, top, log_sum = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(3))
    _launch(_linear_cross_entropy_forward_kernel, logits, (labels, loss, top, log_sum), options)
    return loss, top, log_sum


def _logits_to_gradient(
    logits: Tensor, labels: Tensor, grad: Tensor, top: Tensor, log_sum: Tensor, options: LossOptions
) -> None:
    """Launch the backward kernel: logits (R, V) of a padded buffer become their gradient."""
    _launch(_linear_cross_entropy_backward_kernel, logits, (labels, grad, top, log_sum), options)


def _launch(kernel, logits: Tensor, rows: tuple[Tensor, ...], options: LossOptions) -> None:
    tile = row_tile(arch_of(logits.device), logits.element_size())
    with on_device("linear_cross_entropy", kernel, logits):
        kernel[(logits.shape[0],)](
            logits,
            *(t.contiguous() for t in rows),
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            1.0 if options.softcap is None else options.softcap,
            logits.shape[1],  # V again, not a constant: the compiler unrolls loops of a few turns whole
            V=logits.shape[1],
            ROW_MULTIPLE=ROW_MULTIPLE,
            LANES=tile.block_m,
            WIDTH=tile.block_n,
            HAS_SMOOTHING=options.label_smoothing != 0,
            HAS_SOFTCAP=options.softcap is not None,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _labelled_first(labels: Tensor, ignore_index: int, num_labelled: int | None) -> Tensor | None:
    """(min(num_labelled, T),) int64: rows with a label in order, then others; None (all rows) where none is dropped.

    Nothing waits for the device: where `num_labelled` is more than there are, rows without a label fill the rest up.
    """
    if num_labelled is None or num_labelled >= labels.shape[0]:
        return None
    return torch.argsort(labels == ignore_index, stable=True)[:num_labelled]


@torch.library.custom_op("trichord::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_labelled: int | None,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Row losses (T,), without token weights, and what the backward needs, (2, T): m and l. float32."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    _check_devices(hidden, weight, labels, bias)
    projection, losses_of, _ = _path(hidden, weight, labels, bias, options, num_labelled, compute_dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        losses, statistics = losses_in_chunks(projection, labels, options, losses_of)
    if losses_of is _row_losses and projection.order is not None:
        # More labels than the host said: rows were left out. It cannot be raised here without waiting; NaN is seen.
        too_many = (labels != ignore_index).sum() > projection.order.shape[0]
        losses = torch.where(too_many, float("nan"), losses)
    return losses, statistics


@torch.library.custom_op("trichord::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    num_labelled: int | None,
    compute_dtype: torch.dtype | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """d_hidden, d_weight and d_bias, contiguous, each with 0 elements unless asked for."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    projection, _, to_gradient = _path(hidden, weight, labels, bias, options, num_labelled, compute_dtype)
    needed = (hidden_grad, weight_grad, bias_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        found = gradients_in_chunks(projection, labels, grad_losses, statistics, options, needed, to_gradient)
    empty = _gradients(hidden, weight, (False, False, False))
    grad_hidden, grad_weight, grad_bias = (
        none if grad is None else grad.to(none.dtype) for grad, none in zip(found, empty)
    )
    return grad_hidden, grad_weight, grad_bias


def _path(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    num_labelled: int | None,
    compute_dtype: torch.dtype | None,
):
    """Operands and row arithmetic of the backend that runs: the kernels, or (CPU under torch.compile) plain torch."""
    if choose_backend(hidden.device) == "reference":
        order = labelled_rows(labels, options.ignore_index, num_labelled)
        check_labels(labels if order is None else labels[order], weight.shape[0])
        projection = Projection.of(hidden, weight, bias, order, compute_dtype)
        return projection, row_losses, logits_to_gradient
    _check(hidden, weight, bias)
    order = _labelled_first(labels, options.ignore_index, num_labelled)
    projection = Projection.of(hidden, weight, bias, order, compute_dtype, ROW_MULTIPLE, all_labelled=False)
    return projection, _row_losses, _logits_to_gradient


def _check(*operands: Tensor | None) -> None:
    tensors = [t for t in operands if t is not None]
    if any(t.dtype not in KERNEL_DTYPES for t in tensors):
        raise KernelError(
            "linear_cross_entropy: the Triton kernel takes float32, bfloat16 and float16, got "
            f"{', '.join(str(t.dtype) for t in tensors)}; cast, or set TRICHORD_KERNELS=reference"
        )


def _check_devices(*operands: Tensor | None) -> None:
    devices = sorted({str(t.device) for t in operands if t is not None})
    if len(devices) != 1:
        raise KernelError(
            f"linear_cross_entropy: expected all tensors on one device, got {', '.join(devices)}; move them"
        )


def _losses(hidden: Tensor) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(hidden.shape[0], dtype=wide_dtype(hidden))
    return losses, losses.new_empty((2, hidden.shape[0]))


def _gradients(hidden: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [like.new_empty(s if n else (0,)) for like, s, n in zip((hidden, weight, weight), shapes, needed)]
    return grads[0], grads[1], grads[2]


@linear_cross_entropy_forward.register_fake
def _forward_fake(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *_) -> tuple[Tensor, Tensor]:
    _check_devices(hidden, weight, labels, bias)
    return _losses(hidden)


@linear_cross_entropy_backward.register_fake
def _backward_fake(grad_losses: Tensor, hidden: Tensor, weight: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(hidden, weight, others[-3:])


def _save_for_backward(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, *ctx.options = inputs
    # The Parameter itself, not a view or a copy: under ZeRO-3 its storage is swapped between forward and backward.
    ctx.save_for_backward(hidden, weight, labels, bias, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_losses: Tensor | None, _):
    if grad_losses is None:
        return (None,) * 10
    needed = tuple(bool(ctx.needs_input_grad[i]) for i in (0, 1, 3))
    found = linear_cross_entropy_backward(grad_losses, *ctx.saved_tensors, *ctx.options, *needed)
    grad_hidden, grad_weight, grad_bias = (grad if n else None for grad, n in zip(found, needed))
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 6


linear_cross_entropy_forward.register_autograd(_backward, setup_context=_save_for_backward)
# Autocast is an argument (`compute_dtype`) instead of a cast in front of the op, which would save the cast weight.


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
    """The registered path of `trichord_kernels.linear_cross_entropy`, which documents it."""
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap)
    check_operands(hidden, weight, labels, bias, options, token_weights, reduction, num_labelled)
    losses, _ = linear_cross_entropy_forward(
        hidden,
        weight,
        labels,
        bias,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        num_labelled,
        compute_dtype_of(hidden),
    )
    return reduce_losses(losses, labels, ignore_index, token_weights, reduction)
