"""Late fusion: towers meet only in a shared embedding space. Projection heads and the learned scale."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trichord.objectives.config import ContrastiveConfig


class EmbeddingHead(nn.Module):
    """e = W LN(x) / |W LN(x)|, the norm in fp32."""

    def __init__(self, in_size: int, embed_dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_size)
        self.proj = nn.Linear(in_size, embed_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(I, D) fp32 -> (I, E) fp32 of length 1."""
        projected = self.proj(self.norm(features.to(self.proj.weight.dtype)))
        return F.normalize(projected.float(), dim=-1, eps=1e-6)


class _CapWithReturn(torch.autograd.Function):
    """min(x, cap), whose gradient above the cap is kept where it lowers x (where it is positive)."""

    @staticmethod
    def forward(ctx, x: Tensor, cap: float) -> Tensor:
        ctx.save_for_backward(x > cap)
        return x.clamp(max=cap)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (above,) = ctx.saved_tensors
        return torch.where(above, gradient.clamp(min=0.0), gradient), None


class LogitScale(nn.Module):
    """scale = exp(min(s, log max)), s learned; bias learned for kind `sigmoid`, else 0. Both of shape (1,).

    Above the cap only gradients that lower s pass: a plain clamp would have none at all and never come back.
    (Shape (1,), as DeepSpeed cannot broadcast 0-dimensional parameters.)
    """

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(config.init_temperature)))
        self.bias = nn.Parameter(torch.full((1,), config.init_logit_bias)) if config.kind == "sigmoid" else None
        self.max_log_scale = math.log(config.max_logit_scale)

    def forward(self) -> tuple[Tensor, Tensor]:
        """-> scale (1,) fp32, bias (1,) fp32."""
        capped = _CapWithReturn.apply(self.log_scale.float(), self.max_log_scale)
        bias = torch.zeros_like(capped) if self.bias is None else self.bias.float()
        return capped.exp(), bias
