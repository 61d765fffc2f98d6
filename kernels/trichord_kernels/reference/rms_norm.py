"""RMSNorm with an optional residual in front: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord_kernels.operands import autocast_is_on


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`out = x / sqrt(mean(x^2) + eps) * weight` over the last axis, after `x + residual` where one is given.

    Shapes and dtypes as the public `trichord_kernels.rms_norm`; float64 is allowed too and then stays float64.
    Rounding is Llama's: statistics in float32, the normalised value is rounded to x's dtype, then multiplied by the
    weight, and the product rounded to x's dtype. Under autocast everything is float32, as torch's own norms are.
    """
    if autocast_is_on(x.device.type):
        x, weight = x.float(), weight.float()
        residual = None if residual is None else residual.float()
    check_operands(x, weight, residual)
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    normed = (wide * rstd).to(h.dtype)
    out = (normed * weight).to(h.dtype)
    return out if residual is None else (out, h)


def check_operands(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless the shapes and dtypes fit together (both paths refuse the same mistakes)."""
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: expected weight of shape (D,) with D the last axis of x, got weight {tuple(weight.shape)} "
            f"for x {tuple(x.shape)}; pass the norm's own 1-D weight"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"rms_norm: expected weight in x's dtype ({x.dtype}) or float32, got {weight.dtype}; cast the weight"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: expected residual like x, {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} "
            f"{residual.dtype}; cast or reshape the residual stream"
        )
