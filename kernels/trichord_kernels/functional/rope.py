"""`trichord_kernels.rope`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, choose_backend
from trichord_kernels.operands import require_above_zero, require_floats, require_not_negative, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import rope as op


def rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    sections: Sequence[int] | None = None,
    layout: Literal["interleaved", "sectioned"] = "interleaved",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    attention_scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k in one pass, with the RMS-norm of each head in front where wanted.

    q (T, N, H) and k (T, K, H) float32, bfloat16 or float16, any strides (views of a fused projection, transposed
    (N, T, H)). position_ids (T,), or (A, T) with one row per axis, any real number type: fractions are positions
    too. inv_freq (F,) float32 with 2F <= H; dimensions from 2F on pass through. sections: frequencies per axis, which
    sum to F; `layout` says how they lie: `interleaved` (axes dealt in turn, Qwen3-VL) or `sectioned` (contiguous,
    Qwen2-VL). Positions (T,) stand for all axes. q_weight, k_weight (H,) in q's dtype or float32: RMS-norm over H
    first (Qwen3's QK-norm). attention_scaling multiplies cos and sin.

    Returns new contiguous tensors like q and k. Angles, cos and sin are float32 and then rounded to q's dtype as
    transformers does. Differentiable in q, k and the weights. Raises ValueError for operands that do not fit,
    KernelError for a GPU case that the kernel does not cover.
    """
    required = {"q": q, "k": k, "position_ids": position_ids, "inv_freq": inv_freq}
    require_tensors("rope", required, {"q_weight": q_weight, "k_weight": k_weight})
    require_floats("rope", "q", q)
    require_not_negative("rope", eps=eps)
    require_above_zero("rope", attention_scaling=attention_scaling)
    chosen = reference.rope if choose_backend(q.device) == "reference" else op.rope
    return chosen(
        q,
        k,
        position_ids,
        inv_freq,
        sections=sections,
        layout=layout,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        attention_scaling=attention_scaling,
    )
