"""RMSNorm through our kernel, in the place of the RMSNorm modules of a transformers model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from trichord_kernels import rms_norm

Norm = TypeVar("Norm", bound="RMSNorm")


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (Zhang and Sennrich 2019, eq. 4).

    Attribute names follow transformers' modules, so that state dicts are the same.
    """

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    @classmethod
    def in_place_of(cls: type[Norm], module: Any) -> Norm:
        """The same norm as a transformers RMSNorm, around the same Parameter."""
        return cls(module.weight, float(module.variance_epsilon))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D), same dtype."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ResidualRMSNorm(RMSNorm):
    """RMSNorm of a sum, which is formed in the same pass."""

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both (..., D) -> the norm of their sum, and the sum."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)


def replace_rms_norms(model: nn.Module) -> int:
    """Put our RMSNorm in the place of every transformers RMSNorm of `model`; the Parameters stay the same objects.

    Returns: how many were replaced.
    """
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, RMSNorm):
                setattr(parent, name, RMSNorm.in_place_of(child))
                replaced += 1
    return replaced
