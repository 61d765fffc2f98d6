"""`trichord_kernels.attention`."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, through_op
from trichord_kernels.operands import require_above_zero, require_integers, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import attention as op


@overload
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
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
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
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
    """Attention within the segments of a packed stream: `softmax(scale * q k^T) v`, for queries and keys that see
    each other.

    q (Tq, N, H), k and v (Tk, K, H), one dtype, N a multiple of K (query head n reads key head n * K // N).
    cu_seqlens_q (S+1,) int32 on q's device: boundaries of the segments; cu_seqlens_k the same for keys, None: those of
    the queries (self-attention). max_seqlen_q, max_seqlen_k: upper bounds of the lengths, hints only.
    scale: H ** -0.5 by default. softcap c: scores become c * tanh(scores / c) before the softmax.

    Who sees whom, within a segment. Self-attention: query t sees key j if (causal: j <= t) and (window W: |t - j| < W),
    or if both lie in the same span. span_ends (Tq,) int32: every token of a bidirectional span carries the stream
    position just behind the span, any other its own position + 1 (smaller values are read as that); a prefix-LM is a
    span over the prefix. A span is seen whole, also where it is longer than the window; it is cut at its segment's
    end.
    Cross-attention: causal aligns the last query with the last key; span_ends and window are refused.
    seqused_k (S,) int32: only the first so many keys of each segment exist.

    Returns out (Tq, N, H) in q's dtype; with `return_lse` also lse (N, Tq) float32, the natural log of the sum of the
    exponentiated scores, without a gradient. Rows outside every segment and rows that see no key: out 0, lse -inf,
    gradients 0, whatever the inputs hold there. Differentiable in q, k and v. Nothing but the CPU path reads a size
    from the device.

    Raises:
        ValueError: operands that do not fit, or dropout above 0.
        KernelError: a GPU case that the kernels do not cover.
    """
    required = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q}
    optional = {"cu_seqlens_k": cu_seqlens_k, "span_ends": span_ends, "seqused_k": seqused_k}
    require_tensors("attention", required, optional)
    require_above_zero("attention", scale=scale)
    require_integers("attention", window=window)
    run = op.attention if through_op(q.device) else reference.attention
    return run(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        causal=causal,
        span_ends=span_ends,
        window=window,
        softcap=softcap,
        scale=scale,
        seqused_k=seqused_k,
        dropout=dropout,
        return_lse=return_lse,
    )
