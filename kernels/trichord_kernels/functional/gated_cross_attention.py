"""`trichord_kernels.gated_cross_attention`."""

from __future__ import annotations

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, through_op
from trichord_kernels.operands import require_above_zero, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import gated_cross_attention as op


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
    """`hidden + tanh(gate) * attention(q, k, v)`: text that looks at features through a gate that starts shut.

    hidden (Tq, N, H) in q's dtype or float32, a view of the (Tq, N * H) residual stream; gate (1,) or (N,), one per
    head, in q's dtype or float32. The other arguments are those of `trichord_kernels.attention` for cross-attention.
    Returns out (Tq, N, H) in hidden's dtype; rows that see no key: out = hidden. Differentiable in hidden, q, k, v and
    gate; the gate's gradient is summed in two stages, without atomics.

    Raises:
        ValueError: operands that do not fit.
        KernelError: a GPU case that the kernels do not cover.
    """
    required = {"hidden": hidden, "q": q, "k": k, "v": v, "gate": gate}
    required |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    require_tensors("gated_cross_attention", required, {"seqused_k": seqused_k})
    require_above_zero("gated_cross_attention", scale=scale)
    run = op.gated_cross_attention if through_op(q.device) else reference.gated_cross_attention
    return run(
        hidden,
        q,
        k,
        v,
        gate,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        softcap=softcap,
        scale=scale,
        seqused_k=seqused_k,
    )
