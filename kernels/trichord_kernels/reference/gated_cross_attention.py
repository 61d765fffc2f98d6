"""Gated cross-attention: the definition of correct, as a composition."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord_kernels.reference.attention import attention, check_operands


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
    """`hidden + tanh(gate) * attention(q, k, v)` (Alayrac et al. 2022, Flamingo, section 2.2).

    Shapes and dtypes as the public `trichord_kernels.gated_cross_attention`; float64 is allowed too. The gate and the
    sum are float32, rounded once to hidden's dtype. Under autocast the attention takes its dtype, hidden keeps its own.
    """
    check_gate(hidden, q, gate)
    check_operands(
        q, k, v, cu_seqlens_q, cu_seqlens_k, None, None, softcap, seqused_k, 0.0, name="gated_cross_attention"
    )
    attended = attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softcap=softcap,
        scale=scale,
        seqused_k=seqused_k,
    )
    assert isinstance(attended, Tensor)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    opened = torch.tanh(gate.to(wide))[:, None]
    return (hidden.to(wide) + opened * attended.to(wide)).to(hidden.dtype)


def check_gate(hidden: Tensor, q: Tensor, gate: Tensor) -> None:
    """Raise ValueError unless hidden and gate fit q (both paths refuse the same mistakes)."""
    if hidden.shape != q.shape or hidden.dtype not in (q.dtype, torch.float32) or hidden.device != q.device:
        raise ValueError(
            f"gated_cross_attention: expected hidden {tuple(q.shape)} in q's dtype ({q.dtype}) or float32, on "
            f"{q.device}, got {tuple(hidden.shape)} {hidden.dtype} on {hidden.device}; view it as (Tq, N, H) or cast it"
        )
    if gate.dim() != 1 or gate.shape[0] not in (1, *q.shape[1:2]) or gate.device != q.device:
        raise ValueError(
            f"gated_cross_attention: expected gate (1,) or (N,) = {tuple(q.shape[1:2])} on {q.device}, got "
            f"{tuple(gate.shape)} on {gate.device}; reshape or move the gate"
        )
    if gate.dtype not in (q.dtype, torch.float32):
        raise ValueError(
            f"gated_cross_attention: expected gate in q's dtype ({q.dtype}) or float32, got {gate.dtype}; cast the gate"
        )
