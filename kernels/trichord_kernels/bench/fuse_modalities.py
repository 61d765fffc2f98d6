"""z = w1*x + w2*y + Att(x, y), residual add and RMSNorm, against the same in torch's own ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import fuse_modalities
from trichord_kernels.bench.timing import bench_row, median_ms


def rows(device: torch.device, repeats: int) -> list[dict]:
    return [bench_fusion(device, repeats), bench_fusion_backward(device, repeats)]


def bench_fusion(device: torch.device, repeats: int) -> dict:
    """Forward: reads x, y, attended and residual, writes the new residual and the norm: 6 passes."""
    operands = _inputs(device)

    with torch.no_grad():
        times = median_ms(lambda: _ours(*operands), lambda: _plain(*operands), device, repeats)
    x = operands[0]
    return bench_row("fuse_modalities_fwd", x, times, num_bytes=6 * x.nbytes)


def bench_fusion_backward(device: torch.device, repeats: int) -> dict:
    """Forward and backward with every gradient: 6 passes, then 5 read and 3 written."""
    operands = tuple(t.requires_grad_() for t in _inputs(device))
    grads = torch.randn_like(operands[0]), torch.randn_like(operands[0])

    def run(function) -> None:
        torch.autograd.grad(function(*operands), operands, grads)

    times = median_ms(lambda: run(_ours), lambda: run(_plain), device, repeats)
    x = operands[0]
    return bench_row("fuse_modalities_fwd_bwd", x, times, num_bytes=14 * x.nbytes)


def _ours(x: Tensor, y: Tensor, attended: Tensor, residual: Tensor, w1: Tensor, w2: Tensor, weight: Tensor):
    return fuse_modalities(
        (x, y), (w1, w2), attended=attended, residual=residual, norm="rms", norm_weight=weight, eps=1e-6
    )


def _plain(x: Tensor, y: Tensor, attended: Tensor, residual: Tensor, w1: Tensor, w2: Tensor, weight: Tensor):
    h = residual + (w1 * x + w2 * y + attended)
    return F.rms_norm(h, weight.shape, weight, 1e-6), h


def _inputs(device: torch.device) -> tuple[Tensor, ...]:
    shape, dtype = ((16384, 4096), torch.bfloat16) if device.type == "cuda" else ((1024, 1024), torch.float32)
    operands = [torch.randn(shape, device=device, dtype=dtype) for _ in range(4)]
    return *operands, *(torch.randn(shape[-1], device=device, dtype=dtype) for _ in range(3))
