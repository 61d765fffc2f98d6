"""Gated cross-attention: hidden + tanh(gate) * attention(q, k, v), the gate in the attention kernel's epilogue.

The forward keeps the attention's own output beside the gated one: recovering it from out - hidden would divide by
tanh(gate), and gates start at 0. Backward: one kernel reads d_out and that output, writes tanh(gate) * d_out (what the
attention's backward takes) and, per tile of rows and head, a float32 share of sum(d_out * attended); a torch sum adds
the shares up in a fixed order. d_hidden is d_out itself, returned by autograd, not by the op.
"""

# pyright types a jitted function as the plain one that it was made from, and what it returns as a tuple.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.ops.attention import (
    MaskOperands,
    backward_outputs,
    forward_outputs,
    launch_backward,
    launch_forward,
    reference_attention,
    register_autocast,
)
from trichord_kernels.ops.attention_tiles import INTEGERS, LOG2E, tanh_of_half
from trichord_kernels.ops.launch import on_device
from trichord_kernels.ops.reference_gradients import reference_gradients
from trichord_kernels.reference.attention import check_operands
from trichord_kernels.reference.gated_cross_attention import check_gate

# Elements of one head that a program of the gate's backward takes, 32 per thread: the same everywhere, so that the
# gate's gradient is summed in the same order on every GPU.
GATE_TILE_ELEMENTS = 4096


@triton.jit(do_not_specialize=INTEGERS)
def gate_backward_kernel(
    Grad_out_ptr,
    Attended_ptr,
    Lse_ptr,
    Gate_ptr,
    Grad_attended_ptr,
    Share_ptr,
    total_q,
    H: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GATE_PER_HEAD: tl.constexpr,
):
    """tanh(gate) * d_out and sum(d_out * attended) of BLOCK_ROWS rows of one head; grid (tiles, N), all contiguous.

    Rows that see nothing count as 0 in both, whatever their gradient holds.
    """
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_H)[None, :]
    inside = rows < total_q
    lse = tl.load(Lse_ptr + head * total_q + rows, mask=inside, other=float("-inf"))
    sees = (lse != float("-inf"))[:, None]
    offsets = (rows[:, None] * tl.num_programs(1) + head) * H + cols
    mask = inside[:, None] & (cols < H)
    grad = tl.load(Grad_out_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    attended = tl.load(Attended_ptr + offsets, mask=mask, other=0.0)
    gate = tanh_of_half(tl.load(Gate_ptr + head * GATE_PER_HEAD).to(tl.float32) * 2.0 * LOG2E, True)
    grad = tl.where(sees, grad, 0.0)
    share = tl.sum(tl.sum(grad * attended.to(tl.float32), axis=1), axis=0)
    tl.store(Grad_attended_ptr + offsets, (grad * gate).to(attended.dtype), mask=mask)
    tl.store(Share_ptr + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head, share)


@torch.library.custom_op("trichord::gated_cross_attention_forward", mutates_args=())
def gated_cross_attention_forward(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    causal: bool,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward. Returns out (hidden's dtype), the attention's output (Tq, N, H) and lse, contiguous."""
    mask = MaskOperands(cu_seqlens_q, cu_seqlens_k, None, None, seqused_k, causal, None)
    if choose_backend(q.device) == "reference":
        attended, lse = reference_attention(q, k, v, mask, softcap, scale)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        opened = torch.tanh(gate.to(wide))[:, None]
        out = (hidden.to(wide) + opened * attended.to(wide)).to(hidden.dtype)
        return out.contiguous(), attended.contiguous(), lse.float().contiguous()
    attended, lse = forward_outputs(q)
    out = hidden.new_empty(hidden.shape)
    launch_forward(q, k, v, attended, lse, mask, softcap, scale, gated=(hidden, gate, out))
    return out, attended, lse


@torch.library.custom_op("trichord::gated_cross_attention_backward", mutates_args=())
def gated_cross_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    attended: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    causal: bool,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward. Returns dq, dk, dv and d_gate, contiguous, in the inputs' dtypes."""
    mask = MaskOperands(cu_seqlens_q, cu_seqlens_k, None, None, seqused_k, causal, None)
    if choose_backend(q.device) == "reference":
        return _reference_backward(grad_out, q, k, v, gate, mask, softcap, scale)
    grad_attended, grad_gate = _gate_backward(grad_out, attended, lse, gate)
    grads = backward_outputs(q, k, v)
    launch_backward(grad_attended, q, k, v, attended, lse, grads, mask, softcap, scale)
    return *grads, grad_gate


def _reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    mask: MaskOperands,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cu_seqlens_k = mask.cu_seqlens_k
    assert cu_seqlens_k is not None

    def gated(*leaves: Tensor) -> Tensor:
        return reference.gated_cross_attention(
            torch.zeros_like(grad_out),
            *leaves,
            mask.cu_seqlens_q,
            cu_seqlens_k,
            causal=mask.causal,
            softcap=softcap,
            scale=scale,
            seqused_k=mask.seqused_k,
        )

    return reference_gradients(gated, (q, k, v, gate), grad_out)  # pyright: ignore[reportReturnType]


def _gate_backward(grad_out: Tensor, attended: Tensor, lse: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(gate) * grad_out in the attention's dtype, and the gate's gradient in its own."""
    total_q, num_heads, head_dim = attended.shape
    block_h = triton.next_power_of_2(head_dim)
    block_rows = max(1, GATE_TILE_ELEMENTS // block_h)
    tiles = triton.cdiv(total_q, block_rows)
    grad_attended = attended.new_empty(attended.shape)
    shares = attended.new_empty((tiles, num_heads), dtype=torch.float32)
    with on_device("gated_cross_attention", gate_backward_kernel, attended):
        if attended.numel():
            gate_backward_kernel[(tiles, num_heads)](
                **{"Grad_out_ptr": grad_out.contiguous(), "Attended_ptr": attended.contiguous()},
                **{"Lse_ptr": lse.contiguous(), "Gate_ptr": gate.contiguous()},
                **{"Grad_attended_ptr": grad_attended, "Share_ptr": shares, "total_q": total_q},
                **{"H": head_dim, "BLOCK_ROWS": block_rows, "BLOCK_H": block_h},
                GATE_PER_HEAD=gate.shape[0] > 1,
                num_warps=4,
            )
    by_head = shares.sum(dim=0)
    total = by_head if gate.shape[0] == num_heads else by_head.sum(dim=0, keepdim=True)
    return grad_attended, (total * (1 - torch.tanh(gate.float()) ** 2)).to(gate.dtype)


@gated_cross_attention_forward.register_fake
def _forward_fake(hidden, q, *others) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), *forward_outputs(q)


@gated_cross_attention_backward.register_fake
def _backward_fake(grad_out, q, k, v, gate, *others) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *backward_outputs(q, k, v), gate.new_empty(gate.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    _, attended, lse = output
    # The gate Parameter itself, not a view or a copy: under ZeRO-3 its storage is swapped before the backward.
    ctx.save_for_backward(*inputs[1:5], attended, lse, *inputs[5:8])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(attended, lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, *_: Tensor | None):
    if grad_out is None:
        return (None,) * 11
    needed = ctx.needs_input_grad
    grads = (None,) * 4
    if any(needed[1:5]):
        grads = gated_cross_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    grads = (grad if wanted else None for grad, wanted in zip(grads, needed[1:5]))
    return grad_out if needed[0] else None, *grads, *(None,) * 6


gated_cross_attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
register_autocast("gated_cross_attention_forward", gated_cross_attention_forward, num_cast=3, first=1)


def gated_cross_attention(
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    softcap: float | None = None,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """The Triton path of `trichord_kernels.gated_cross_attention`, which documents it. No max_seqlen is needed."""
    check_gate(hidden, q, gate)
    check_operands(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, None, softcap, seqused_k, 0.0, name="gated_cross_attention"
    )
    chosen_scale: float = q.shape[2] ** -0.5 if scale is None else scale
    return gated_cross_attention_forward(
        hidden, q, k, v, gate, cu_seqlens_q, cu_seqlens_k, seqused_k, causal, softcap, chosen_scale
    )[0]
