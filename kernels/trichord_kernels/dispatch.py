"""Which implementation runs: the Triton kernel on a GPU, the plain-torch twin on a CPU.

`TRICHORD_KERNELS` overrides the choice: `auto` (by device, the default), `triton`, `reference`. A GPU case that a
kernel does not cover raises `KernelError`; nothing falls back in silence.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import overload

import torch
from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.errors import KernelError

if find_spec("triton") is not None:  # absent off Linux, where the reference is all there is
    from trichord_kernels.ops import rms_norm as rms_norm_op
else:
    rms_norm_op = None

BACKENDS = ("auto", "triton", "reference")


def requested_backend() -> str:
    """The value of TRICHORD_KERNELS (default `auto`). Raises KernelError for a word that is no backend."""
    value = os.environ.get("TRICHORD_KERNELS", "auto")
    if value not in BACKENDS:
        raise KernelError(f"TRICHORD_KERNELS: expected one of {', '.join(BACKENDS)}, got {value!r}; set it or unset it")
    return value


def choose_backend(device: torch.device) -> str:
    """`triton` or `reference` for tensors on `device`. Raises KernelError if Triton is wanted but not installed."""
    requested = requested_backend()
    if requested == "reference" or (requested == "auto" and device.type in ("cpu", "meta")):
        return "reference"
    if rms_norm_op is None:
        raise KernelError(
            f"expected triton for tensors on {device.type} (TRICHORD_KERNELS={requested}), but it is not installed; "
            "pip install triton, or set TRICHORD_KERNELS=reference"
        )
    return "triton"


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
    if choose_backend(x.device) == "reference":
        return reference.rms_norm(x, weight, eps, residual)
    return rms_norm_op.rms_norm(x, weight, eps, residual)
