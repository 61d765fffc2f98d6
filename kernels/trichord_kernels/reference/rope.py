"""Rotary position embedding of q and k, one or several position axes, QK-norm in front: the definition of correct.

Su et al., RoFormer, arXiv:2104.09864, equation 34, in the half-split form of Llama; several axes as in Qwen2-VL
(arXiv:2409.12191, contiguous sections) and Qwen3-VL (interleaved).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from trichord_kernels.operands import without_autocast
from trichord_kernels.reference.rms_norm import rms_norm

LAYOUTS = ("interleaved", "sectioned")


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
    """`x * cos + rotate_half(x) * sin` for q and k, after the RMS-norm of each head where a weight is given.

    Shapes and dtypes as the public `trichord_kernels.rope`; float64 is allowed too and then stays float64, with the
    float64 cosine of the same float32 angle. Rounding is transformers': cos and sin to q's dtype, then every product
    and the sum. Autocast changes nothing: the result has q's dtype.
    """
    check_operands(q, k, position_ids, inv_freq, sections, layout, q_weight, k_weight)
    with without_autocast(q.device.type), torch.no_grad():
        cos, sin = _cos_and_sin(position_ids, inv_freq, sections, layout, attention_scaling, q.dtype)
    with without_autocast(q.device.type):
        return _normed_and_turned(q, q_weight, eps, cos, sin), _normed_and_turned(k, k_weight, eps, cos, sin)


def assign_axes(sections: Sequence[int], layout: str) -> list[int]:
    """The position axis of each rotary frequency, high to low.

    `interleaved` deals the axes in turn (t h w t h w ...) until each has its share; `sectioned` gives each axis one
    contiguous block.
    """
    if layout == "sectioned":
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    return [axis for turn in range(max(sections, default=0)) for axis, count in enumerate(sections) if turn < count]


def _cos_and_sin(
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: Sequence[int] | None,
    layout: str,
    attention_scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """cos and sin (T, 1, F) in `dtype`, F the number of frequencies."""
    positions = position_ids.float()
    if positions.dim() == 2 and positions.shape[0] > 1 and sections is not None:
        positions = positions[torch.tensor(assign_axes(sections, layout), device=positions.device)].T  # (T, F)
    else:
        positions = positions.reshape(-1, 1)
    angles = (positions * inv_freq).to(torch.promote_types(dtype, torch.float32))[:, None, :]
    return (angles.cos() * attention_scaling).to(dtype), (angles.sin() * attention_scaling).to(dtype)


def _normed_and_turned(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, N, H) and cos, sin (T, 1, F): the first 2F of each head turned, the rest as it is."""
    if weight is not None:
        normed = rms_norm(x, weight, eps)
        assert isinstance(normed, Tensor)
        x = normed
    half = cos.shape[-1]
    low, high, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)


def check_operands(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    sections: Sequence[int] | None,
    layout: str,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    """Raise ValueError unless the operands fit together (both paths refuse the same mistakes)."""
    fits = q.dim() == 3 and k.dim() == 3 and q.shape[0] == k.shape[0] and q.shape[2] == k.shape[2]
    if not fits or q.dtype != k.dtype:
        raise ValueError(
            f"rope: expected q (T, N, H) and k (T, K, H) of one dtype, got {tuple(q.shape)} {q.dtype} and "
            f"{tuple(k.shape)} {k.dtype}; flatten batch and time to one axis and cast"
        )
    if inv_freq.dim() != 1 or inv_freq.dtype != torch.float32 or not 0 < 2 * inv_freq.numel() <= q.shape[-1]:
        raise ValueError(
            f"rope: expected inv_freq (F,) float32 with 2 <= 2F <= H = {q.shape[-1]}, got {tuple(inv_freq.shape)} "
            f"{inv_freq.dtype}; keep the frequencies in float32 when the module is cast"
        )
    _check_positions(q.shape[0], position_ids, inv_freq.numel(), sections, layout)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (weight.shape != q.shape[-1:] or weight.dtype not in (q.dtype, torch.float32)):
            raise ValueError(
                f"rope: expected {name} ({q.shape[-1]},) in q's dtype ({q.dtype}) or float32, got "
                f"{tuple(weight.shape)} {weight.dtype}; pass the head norm's own 1-D weight"
            )


def _check_positions(
    num_tokens: int, position_ids: Tensor, num_frequencies: int, sections: Sequence[int] | None, layout: str
) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"rope: expected layout out of {', '.join(LAYOUTS)}, got {layout!r}")
    if sections is not None and (min(sections, default=0) < 0 or sum(sections) != num_frequencies):
        raise ValueError(
            f"rope: expected sections that sum to the {num_frequencies} frequencies of inv_freq, got {tuple(sections)} "
            f"with sum {sum(sections)}"
        )
    axes = 1 if sections is None else len(sections)
    fits = position_ids.dim() == 1 or (position_ids.dim() == 2 and position_ids.shape[0] in (1, axes))
    if not fits or position_ids.shape[-1] != num_tokens or position_ids.is_complex():
        raise ValueError(
            f"rope: expected position_ids real, of shape ({num_tokens},) or ({axes}, {num_tokens}) (sections "
            f"{None if sections is None else tuple(sections)}), got {tuple(position_ids.shape)} {position_ids.dtype}; "
            "one row per axis of sections, one column per token"
        )
