"""Attention over packed segments: Triton forward and backward, registered as two torch ops.

    out = softmax(cap(scale * q k^T)) v over the keys a query sees; lse = log sum exp of the scores, float32

The kernels are in attention_forward.py and attention_backward.py, what they share in attention_tiles.py. Every mask is
an interval of keys per query, from few integers: [p - left, p + right) around the query's own position p, and its span.
Tiles outside all intervals are never visited, tiles inside all run without mask code. Under torch.compile on a CPU the
same ops run the reference.
"""

# Triton types a jitted kernel as the function it was made from.
# pyright: reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import choose_backend
from trichord_kernels.errors import KernelError
from trichord_kernels.ops.attention_backward import attention_dkdv_kernel, attention_dq_kernel
from trichord_kernels.ops.attention_forward import attention_forward_kernel
from trichord_kernels.ops.attention_tiles import FAR, num_slots, split_head_dim
from trichord_kernels.ops.launch import STRIDE_UNIT, check_row_operands, on_device
from trichord_kernels.ops.reference_gradients import reference_gradients
from trichord_kernels.reference.attention import check_operands
from trichord_kernels.reference.visibility import span_bounds
from trichord_kernels.tables.attention import DKDV, DQ, FORWARD, edge_stages, tile_for
from trichord_kernels.tables.tile import Tile, arch_of

MAX_HEAD_DIM = 256
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class MaskOperands:
    """What decides who sees whom. cu_seqlens_k None: self-attention; spans as `span_bounds` gives them."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor | None
    span_begins: Tensor | None
    span_ends: Tensor | None
    seqused_k: Tensor | None
    causal: bool
    window: int | None

    def kernel_arguments(self) -> dict[str, Any]:
        """By the kernels' names: the query at p (its position among the keys) sees [p - left, p + right)."""
        far = FAR.value
        left = far if self.window is None else min(self.window - 1, far)
        right = 1 if self.causal else min(left + 1, far)
        return {
            "Cu_q_ptr": self.cu_seqlens_q.contiguous(),
            "Cu_k_ptr": (self.cu_seqlens_q if self.cu_seqlens_k is None else self.cu_seqlens_k).contiguous(),
            "Used_k_ptr": None if self.seqused_k is None else self.seqused_k.contiguous(),
            "Span_begins_ptr": None if self.span_begins is None else self.span_begins.contiguous(),
            "Span_ends_ptr": None if self.span_ends is None else self.span_ends.contiguous(),
            "num_segments": self.cu_seqlens_q.shape[0] - 1,
            "left": left,
            "right": right,
            "align_ends": int(self.causal and self.cu_seqlens_k is not None),
        }


@torch.library.custom_op("trichord::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    span_begins: Tensor | None,
    span_ends: Tensor | None,
    seqused_k: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Launch the forward. Returns out (Tq, N, H) and lse (N, Tq) float32, contiguous."""
    mask = MaskOperands(cu_seqlens_q, cu_seqlens_k, span_begins, span_ends, seqused_k, causal, window)
    if choose_backend(q.device) == "reference":
        out, lse = reference_attention(q, k, v, mask, softcap, scale)
        return out.contiguous(), lse.float().contiguous()
    out, lse = forward_outputs(q)
    launch_forward(q, k, v, out, lse, mask, softcap, scale)
    return out, lse


@torch.library.custom_op("trichord::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    span_begins: Tensor | None,
    span_ends: Tensor | None,
    seqused_k: Tensor | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward. Returns dq, dk and dv, contiguous, in the inputs' dtype."""
    mask = MaskOperands(cu_seqlens_q, cu_seqlens_k, span_begins, span_ends, seqused_k, causal, window)
    if choose_backend(q.device) == "reference":
        return reference_gradients(  # pyright: ignore[reportReturnType]
            lambda *leaves: reference_attention(*leaves, mask, softcap, scale, return_lse=False)[0], (q, k, v), grad_out
        )
    grads = backward_outputs(q, k, v)
    launch_backward(grad_out, q, k, v, out, lse, grads, mask, softcap, scale)
    return grads


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskOperands,
    softcap: float | None,
    scale: float,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """The reference on an op's operands; without `return_lse` (a cheaper path there) the lse has 0 elements."""
    result = reference.attention(
        q,
        k,
        v,
        mask.cu_seqlens_q,
        mask.cu_seqlens_k,
        causal=mask.causal,
        span_ends=mask.span_ends,
        window=mask.window,
        softcap=softcap,
        scale=scale,
        seqused_k=mask.seqused_k,
        return_lse=return_lse,
    )
    return result if isinstance(result, tuple) else (result, q.new_empty(0))


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: MaskOperands,
    softcap: float | None,
    scale: float,
    gated: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Fill out and lse. `gated`: hidden and gate, and the contiguous tensor that takes hidden + tanh(gate) * out."""
    check_kernel_operands(q, k, v, mask, scale)
    (q, k, v), unit = _aligned(q, k, v)
    tile = _tile(FORWARD, q)
    hidden, gate, gated_out = gated or (None, None, None)
    with on_device("attention", attention_forward_kernel, q):
        if out.numel():
            attention_forward_kernel[(_query_slots(q, mask, tile), q.shape[1])](
                **{"Q_ptr": q, "K_ptr": k, "V_ptr": v, "Out_ptr": out, "Lse_ptr": lse},
                **{"Hidden_ptr": None if hidden is None else hidden.contiguous(), "Gate_ptr": gate},
                **{"Gated_ptr": gated_out, "GATE_PER_HEAD": gate is not None and gate.shape[0] > 1},
                **_common_arguments(q, k, v, unit, mask, softcap, scale, tile),
            )


def launch_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    mask: MaskOperands,
    softcap: float | None,
    scale: float,
) -> None:
    """Fill dq, dk and dv (`grads`). The dq kernel runs first: it leaves delta for the other one."""
    check_kernel_operands(q, k, v, mask, scale)
    (q, k, v, grad_out), unit = _aligned(q, k, v, grad_out)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    shared = {
        "Q_ptr": q,
        "K_ptr": k,
        "V_ptr": v,
        "Grad_out_ptr": grad_out,
        "Lse_ptr": lse,
        "Delta_ptr": delta,
    }
    shared |= {"grad_row_stride": grad_out.stride(0) // unit, "grad_head_stride": grad_out.stride(1) // unit}
    shared |= {"grad_scale": scale}
    dq_tile, dkdv_tile = _tile(DQ, q), _tile(DKDV, q)
    with on_device("attention", attention_dq_kernel, q):
        if q.numel():
            attention_dq_kernel[(_query_slots(q, mask, dq_tile), q.shape[1])](
                **{"Out_ptr": out.contiguous(), "Grad_q_ptr": grads[0]},
                **shared,
                **_common_arguments(q, k, v, unit, mask, softcap, scale, dq_tile),
            )
        if k.numel():
            num_segments = mask.cu_seqlens_q.shape[0] - 1
            attention_dkdv_kernel[(num_slots(k.shape[0], num_segments, dkdv_tile.block_n), k.shape[1])](
                **{"Grad_k_ptr": grads[1], "Grad_v_ptr": grads[2], "total_k": k.shape[0]},
                **shared,
                **_common_arguments(q, k, v, unit, mask, softcap, scale, dkdv_tile),
            )


def _query_slots(q: Tensor, mask: MaskOperands, tile: Tile) -> int:
    return num_slots(q.shape[0], mask.cu_seqlens_q.shape[0] - 1, tile.block_m)


def _tile(table: dict[tuple, Tile], q: Tensor) -> Tile:
    return tile_for(table, arch_of(q.device), sum(split_head_dim(q.shape[2])), q.element_size())


def _aligned(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors as the kernels read them, and the unit their strides are given in.

    A tensor whose rows of H do not lie together, or do not start at multiples of 16 bytes where they could, is copied.
    """
    could = tensors[0].shape[-1] % STRIDE_UNIT == 0
    taken = [t if _rows_fit(t, could) else t.contiguous() for t in tensors]
    # a contiguous view may still begin off a 16-byte boundary; `.contiguous()` returns it as it is
    taken = [t.clone() if could and t.data_ptr() % 16 else t for t in taken]
    units = all(stride % STRIDE_UNIT == 0 for t in taken for stride in t.stride()[:2])
    return taken, STRIDE_UNIT if units else 1


def _rows_fit(t: Tensor, could_align: bool) -> bool:
    if t.shape[2] > 1 and t.stride(2) != 1:
        return False
    return not could_align or (t.data_ptr() % 16 == 0 and not any(stride % STRIDE_UNIT for stride in t.stride()[:2]))


def _common_arguments(
    q: Tensor, k: Tensor, v: Tensor, unit: int, mask: MaskOperands, softcap: float | None, scale: float, tile: Tile
) -> dict[str, Any]:
    main, tail = split_head_dim(q.shape[2])
    strides = {
        f"{name}_{axis}_stride": t.stride(i) // unit
        for name, t in (("q", q), ("k", k), ("v", v))
        for i, axis in enumerate(("row", "head"))
    }
    # Scores come out in log-2 units: dot * outer, or with a softcap tanh(dot * inner / 2 / log2 e) * outer.
    return {
        **mask.kernel_arguments(),
        **strides,
        "total_q": q.shape[0],
        "groups": q.shape[1] // max(k.shape[1], 1),
        "inner_scale": 0.0 if softcap is None else 2 * _LOG2E * scale / softcap,
        "outer_scale": _LOG2E * (scale if softcap is None else softcap),
        "H": q.shape[2],
        "MAIN": main,
        "TAIL": tail,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "STRIDE_UNIT": unit,
        "EDGE_STAGES": edge_stages(tile),
        "SOFTCAP": softcap is not None,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def check_kernel_operands(q: Tensor, k: Tensor, v: Tensor, mask: MaskOperands, scale: float) -> None:
    """Raise KernelError for what the reference takes and the kernels do not."""
    integers = (mask.cu_seqlens_q, mask.cu_seqlens_k, mask.span_begins, mask.span_ends, mask.seqused_k)
    check_row_operands("attention", q, k, v, *integers)
    if not 1 <= q.shape[2] <= MAX_HEAD_DIM:
        raise KernelError(
            f"attention: the Triton kernels take head dims of 1 to {MAX_HEAD_DIM}, got {q.shape[2]}; set "
            "TRICHORD_KERNELS=reference"
        )
    if max(q.shape[0], k.shape[0]) >= FAR.value or q.shape[1] > 65535:
        raise KernelError(
            f"attention: the Triton kernels take fewer than {FAR.value} tokens and up to 65535 heads, got "
            f"{max(q.shape[0], k.shape[0])} and {q.shape[1]}; split the stream"
        )
    if not scale >= 0:
        raise KernelError(f"attention: the Triton kernels take a scale of at least 0, got {scale}; negate q instead")


def forward_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def backward_outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@attention_forward.register_fake
def _forward_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, span_begins, span_ends, seqused_k, causal, window, softcap, scale
) -> tuple[Tensor, Tensor]:
    return forward_outputs(q)


@attention_backward.register_fake
def _backward_fake(grad_out, q, k, v, out, lse, *mask_and_scale) -> tuple[Tensor, Tensor, Tensor]:
    return backward_outputs(q, k, v)


def _save_for_backward(ctx, inputs, output) -> None:
    out, lse = output
    ctx.save_for_backward(*inputs[:3], out, lse, *inputs[3:8])
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, _: Tensor | None):
    if grad_out is None:
        return (None,) * 12
    grads = attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return *(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad)), *(None,) * 9


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)

_LIBRARY = torch.library.Library("trichord", "FRAGMENT")


def register_autocast(name: str, op: Any, num_cast: int, first: int = 0) -> None:
    """Under autocast cast `num_cast` tensors from argument `first` on to its dtype, whichever that is.

    `CustomOpDef.register_autocast` fixes the dtype at registration; attention follows the caller's, as torch's does.
    """
    for device_type, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):

        def cast_and_run(*arguments: Any, device_type: str = device_type) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast = [
                t.to(dtype) if first <= i < first + num_cast and t.dtype != torch.float64 else t
                for i, t in enumerate(arguments)
            ]
            with torch.autocast(device_type, enabled=False):
                return op(*cast)

        _LIBRARY.impl(name, cast_and_run, key)


register_autocast("attention_forward", attention_forward, num_cast=3)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    span_ends: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    seqused_k: Tensor | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The Triton path of `trichord_kernels.attention`, which documents it. The grid needs no max_seqlen."""
    check_operands(q, k, v, cu_seqlens_q, cu_seqlens_k, span_ends, window, softcap, seqused_k, dropout)
    spans = (None, None) if span_ends is None else span_bounds(span_ends)
    chosen_scale: float = q.shape[2] ** -0.5 if scale is None else scale
    out, lse = attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *spans, seqused_k, causal, window, softcap, chosen_scale
    )
    return (out, lse) if return_lse else out
