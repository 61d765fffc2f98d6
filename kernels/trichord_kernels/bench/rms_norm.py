"""RMSNorm with the residual add, against torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import rms_norm
from trichord_kernels.bench.timing import bench_row, median_ms


def rows(device: torch.device, repeats: int) -> list[dict]:
    return [bench_rms_norm(device, repeats), bench_rms_norm_backward(device, repeats)]


def bench_rms_norm(device: torch.device, repeats: int) -> dict:
    """Residual add + norm, forward, against `x + residual` and torch's own rms_norm."""
    x, residual, weight = _rms_norm_inputs(device)

    def plain() -> Tensor:
        return F.rms_norm(x + residual, weight.shape, weight, 1e-6)

    with torch.no_grad():
        times = median_ms(lambda: rms_norm(x, weight, residual=residual), plain, device, repeats)
    return bench_row("add_rms_norm_fwd", x, times, num_bytes=4 * x.nbytes)


def bench_rms_norm_backward(device: torch.device, repeats: int) -> dict:
    """Forward and backward of the residual add + norm with gradients of x, residual and weight."""
    x, residual, weight = (t.requires_grad_() for t in _rms_norm_inputs(device))
    grad = torch.randn_like(x)

    def ours() -> None:
        torch.autograd.grad(rms_norm(x, weight, residual=residual), (x, residual, weight), (grad, grad))

    def plain() -> None:
        h = x + residual
        out = F.rms_norm(h, weight.shape, weight, 1e-6)
        torch.autograd.grad((out, h), (x, residual, weight), (grad, grad))

    times = median_ms(ours, plain, device, repeats)
    return bench_row("add_rms_norm_fwd_bwd", x, times, num_bytes=8 * x.nbytes)


def _rms_norm_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = ((16384, 4096), torch.bfloat16) if device.type == "cuda" else ((1024, 1024), torch.float32)
    x, residual = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    return x, residual, torch.randn(shape[-1], device=device, dtype=dtype)
