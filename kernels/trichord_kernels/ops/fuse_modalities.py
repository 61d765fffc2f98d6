"""fuse_modalities as two torch ops, forward and backward, with their fakes, autograd and autocast.

The kernels and their launchers are in `fuse_modalities_forward.py` and `fuse_modalities_backward.py`. Saved for the
backward: the inputs (where a gradient reads them), the weights as they came, gate logits, presence, and h, which is
`new_residual`; without a residual h is mixed again, from the inputs and `attended`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trichord_kernels.errors import KernelError
from trichord_kernels.ops.fuse_modalities_backward import Wanted, launch_backward
from trichord_kernels.ops.fuse_modalities_forward import launch_forward, plan_mix
from trichord_kernels.ops.launch import check_row_operands
from trichord_kernels.reference.fuse_modalities import check_operands

# The backward keeps a row of h, of gradients and of sums in registers; beyond this width it spills.
MAX_HIDDEN_SIZE = 8192


@torch.library.custom_op("trichord::fuse_modalities_forward", mutates_args=())
def fuse_modalities_forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate_logits: Tensor | None,
    present: Tensor | None,
    attended: Tensor | None,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward. norm: none, rms or layer; no weights: []. Returns out (0 elements without a norm) and h (0
    elements with a norm and no residual), contiguous."""
    _check(inputs, weights, gate_logits, present, attended, residual, norm, norm_weight, norm_bias)
    out, h = _forward_outputs(inputs[0], residual, norm)
    mix = plan_mix(len(inputs), inputs[0].shape[1], weights, gate_logits, present)
    launch_forward(inputs, mix, attended, residual, norm, norm_weight, norm_bias, eps, out, h)
    return out, h


@torch.library.custom_op("trichord::fuse_modalities_backward", mutates_args=())
def fuse_modalities_backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor | None,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate_logits: Tensor | None,
    present: Tensor | None,
    attended: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    inputs_wanted: int,
    weights_wanted: bool,
    gates_wanted: bool,
    z_wanted: bool,
    norm_wanted: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward. grad: of the norm's output, or of h where norm is none. h None with a norm: mix it again.

    Returns the gradients of inputs, weights, gate_logits, z, norm_weight and norm_bias, contiguous, each in its
    operand's dtype; what is not wanted has 0 elements. inputs_wanted: bit i is inputs[i]; z is not made without a norm,
    where its gradient is `grad`.
    """
    bias_wanted = norm_wanted and norm_bias is not None
    wanted = Wanted(inputs_wanted, weights_wanted, gates_wanted, z_wanted, norm_wanted, bias_wanted)
    outputs = _backward_outputs(grad, inputs, weights, gate_logits, norm_weight, norm_bias, wanted)
    grad_inputs, grad_weights, grad_gates, grad_z, grad_norm_weight, grad_norm_bias = outputs
    if not grad.shape[0]:
        for sums in (*grad_weights, grad_norm_weight, grad_norm_bias):
            sums.zero_()
        return outputs
    mix = plan_mix(len(inputs), grad.shape[1], weights, gate_logits, present)
    grad_table = grad.new_empty((grad.shape[0] if gates_wanted else 0, mix.table_n), dtype=torch.float32)
    weight_sums, norm_sums = launch_backward(
        grad, grad_h, h, inputs, mix, attended, norm, norm_weight, eps, wanted, grad_inputs, grad_z, grad_table
    )
    for out, weight_sum in zip(grad_weights, weight_sums):
        if out.numel():
            out.copy_(weight_sum if out.shape == weight_sum.shape else weight_sum.sum(dim=0, keepdim=True))
    for out, norm_sum in zip((grad_norm_weight, grad_norm_bias), norm_sums):
        out.copy_(norm_sum)
    if gates_wanted:
        grad_gates.copy_(grad_table[:, : len(inputs)])
    return outputs


def _check(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate_logits: Tensor | None,
    present: Tensor | None,
    attended: Tensor | None,
    residual: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    check_operands(
        inputs,
        weights or None,
        gate_logits,
        present,
        attended,
        residual,
        None if norm == "none" else norm,
        norm_weight,
        norm_bias,
    )
    others = (gate_logits, present, attended, residual, norm_weight, norm_bias)
    check_row_operands("fuse_modalities", inputs[0], *inputs[1:], *weights, *others)
    if not 1 <= inputs[0].shape[1] <= MAX_HIDDEN_SIZE:
        raise KernelError(
            f"fuse_modalities: the Triton kernel takes rows of 1 to {MAX_HIDDEN_SIZE} elements, got "
            f"{inputs[0].shape[1]}; set TRICHORD_KERNELS=reference"
        )


def _forward_outputs(first: Tensor, residual: Tensor | None, norm: str) -> tuple[Tensor, Tensor]:
    out_shape = (0,) if norm == "none" else first.shape
    h_shape = first.shape if norm == "none" or residual is not None else (0,)
    return first.new_empty(out_shape), first.new_empty(h_shape)


def _backward_outputs(
    grad: Tensor,
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gate_logits: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    wanted: Wanted,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None, is_wanted: bool) -> Tensor:
        return grad.new_empty((0,)) if t is None else t.new_empty(t.shape if is_wanted else (0,))

    return (
        [like(x, bool((wanted.inputs >> i) & 1)) for i, x in enumerate(inputs)],
        [like(weight, wanted.weights) for weight in weights],
        like(gate_logits, wanted.gates),
        like(grad, wanted.z),
        like(norm_weight, wanted.norm_weight),
        like(norm_bias, wanted.norm_bias),
    )


@fuse_modalities_forward.register_fake
def _forward_fake(inputs, weights, gate_logits, present, attended, residual, norm, norm_weight, norm_bias, eps):
    _check(inputs, weights, gate_logits, present, attended, residual, norm, norm_weight, norm_bias)
    return _forward_outputs(inputs[0], residual, norm)


@fuse_modalities_backward.register_fake
def _backward_fake(
    grad,
    grad_h,
    h,
    inputs,
    weights,
    gate_logits,
    present,
    attended,
    norm,
    norm_weight,
    norm_bias,
    eps,
    inputs_wanted,
    weights_wanted,
    gates_wanted,
    z_wanted,
    norm_wanted,
):
    bias_wanted = norm_wanted and norm_bias is not None
    wanted = Wanted(inputs_wanted, weights_wanted, gates_wanted, z_wanted, norm_wanted, bias_wanted)
    return _backward_outputs(grad, inputs, weights, gate_logits, norm_weight, norm_bias, wanted)


def _save_for_backward(ctx, inputs, output) -> None:
    xs, weights, gate_logits, present, attended, residual, norm, norm_weight, norm_bias, eps = inputs
    h = output[1] if norm != "none" and residual is not None else None
    mixes_again = norm != "none" and h is None
    is_plain_sum = not weights and gate_logits is None and present is None  # then every input's gradient is that of z
    kept = [] if is_plain_sum and not mixes_again else xs
    # Parameters themselves, not views or copies: under ZeRO-3 their storage is swapped between forward and backward.
    optional = (gate_logits, present, attended if mixes_again else None, h, norm_weight, norm_bias)
    ctx.save_for_backward(*kept, *weights, *optional)
    ctx.num_inputs, ctx.num_kept, ctx.num_weights, ctx.is_plain_sum = len(xs), len(kept), len(weights), is_plain_sum
    ctx.norm, ctx.eps, ctx.has_residual = norm, eps, residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_h: Tensor | None):
    xs, weights, optional = _split(ctx.saved_tensors, ctx.num_kept, ctx.num_weights)
    gate_logits, present, attended, h, norm_weight, norm_bias = optional
    norm, needs = ctx.norm, ctx.needs_input_grad
    if grad_out is None or norm == "none":  # h is the only result, or the only one used
        norm, grad_out, grad_h = "none", grad_h, None
        attended = h = norm_weight = norm_bias = None
    if grad_out is None:
        return [None] * ctx.num_inputs, [None] * ctx.num_weights, *[None] * 8
    if not ctx.has_residual:
        grad_h = None
    by_z = [needs[4], needs[5], *(needs[0] if ctx.is_plain_sum else ())]
    inputs_wanted = 0 if ctx.is_plain_sum else sum(1 << i for i, needed in enumerate(needs[0]) if needed)
    wanted = (
        any(needs[1]),
        bool(needs[2]),
        norm != "none" and any(by_z),
        norm != "none" and bool(needs[7] or needs[8]),
    )
    if inputs_wanted or any(wanted):
        operands = (xs, weights, gate_logits, present, attended, norm, norm_weight, norm_bias, ctx.eps)
        grads = fuse_modalities_backward(grad_out, grad_h, h, *operands, inputs_wanted, *wanted)
    else:
        grads = [], [], None, None, None, None
    grad_z = grad_out if norm == "none" else grads[3]
    grad_inputs = [grad_z] * ctx.num_inputs if ctx.is_plain_sum else grads[0]
    one_each = [grads[2], None, grad_z, grad_z, None, *(grads[4:] if wanted[3] else (None, None)), None]
    return (
        [grad if needed else None for grad, needed in zip(grad_inputs, needs[0])],
        [grad if needed else None for grad, needed in zip(grads[1], needs[1])],
        *(grad if needed else None for grad, needed in zip(one_each, needs[2:])),
    )


def _split(saved: Sequence[Tensor], *counts: int) -> list[Sequence[Tensor]]:
    """Consecutive pieces of these lengths, and the rest."""
    pieces = []
    for count in counts:
        pieces.append(saved[:count])
        saved = saved[count:]
    return [*pieces, saved]


fuse_modalities_forward.register_autograd(_backward, setup_context=_save_for_backward)
# float32 is torch's own policy for norms under autocast.
for _device_type in ("cuda", "cpu"):
    fuse_modalities_forward.register_autocast(_device_type, torch.float32)


def fuse_modalities(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    gate_logits: Tensor | None = None,
    present: Tensor | None = None,
    attended: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Literal["rms", "layer"] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Triton path of `trichord_kernels.fuse_modalities`, which documents it."""
    if weights is not None and not weights:
        raise ValueError(f"fuse_modalities: expected one weight per input, {len(inputs)}, got 0")
    out, h = fuse_modalities_forward(
        inputs,
        weights or [],
        gate_logits,
        present,
        attended,
        residual,
        norm or "none",
        norm_weight,
        norm_bias,
        eps,
    )
    if norm is None:
        out = h
    return out if residual is None else (out, h)
