"""`trichord_kernels.rms_norm`."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, choose_backend
from trichord_kernels.operands import require_floats, require_not_negative, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import rms_norm as op


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor = ...) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last axis, with the residual add in front when one is given.

    x (..., D) float32, bfloat16 or float16, any strides; weight (D,) in x's dtype or float32; residual like x.
    Returns `out` (..., D) in x's dtype, or `(out, new_residual)` with `new_residual = x + residual` (in x's dtype)
    and `out` the norm of new_residual. Statistics are float32; rounding is Llama's (see `reference/rms_norm.py`).
    Differentiable in x, weight and residual. Raises ValueError for operands that do not fit, KernelError for a GPU
    case the kernel does not cover.
    """
    require_tensors("rms_norm", {"x": x, "weight": weight}, {"residual": residual})
    require_floats("rms_norm", "x", x)
    require_not_negative("rms_norm", eps=eps)
    if choose_backend(x.device) == "reference":
        return reference.rms_norm(x, weight, eps, residual)
    return op.rms_norm(x, weight, eps, residual)
