"""Symmetric InfoNCE of a whole batch, forward and backward, against the matrix of logits with autograd.

The dense form is open_clip's: logits once, cross-entropy over its rows and over those of its transpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import contrastive_loss
from trichord_kernels.bench.memory import gpu_peak_mib, peak_mib
from trichord_kernels.bench.timing import bench_row, median_ms

_CPU_TURNS = 3  # a run takes seconds: more turns than that tell nothing new


@dataclass(frozen=True)
class Shape:
    batch: int
    embed_dim: int


GPU_SHAPES = (Shape(16384, 256), Shape(16384, 1024))
CPU_SHAPE = Shape(8192, 256)
QUICK_SHAPE = Shape(256, 64)  # fewer than 5 repeats: a look whether it runs


def rows(device: torch.device, repeats: int) -> list[dict]:
    if device.type == "cuda":
        return [_gpu_row(shape, device, repeats) for shape in GPU_SHAPES]
    shape = CPU_SHAPE if repeats >= 5 else QUICK_SHAPE
    tensors = inputs(shape, device)
    times = median_ms(lambda: run_ours(*tensors), lambda: run_dense(*tensors), device, _CPU_TURNS)
    ours_mib, dense_mib = (peak_mib(make_run, name, shape) for name in ("ours", "dense"))
    return [_row(tensors, times) | {"peak_mib": ours_mib, "torch_peak_mib": dense_mib}]


def _gpu_row(shape: Shape, device: torch.device, repeats: int) -> dict:
    tensors = inputs(shape, device)

    def ours() -> None:
        run_ours(*tensors)

    def dense() -> None:
        run_dense(*tensors)

    row = _row(tensors, median_ms(ours, dense, device, repeats))
    peaks = {"peak_mib": gpu_peak_mib(ours, device), "torch_peak_mib": gpu_peak_mib(dense, device)}
    return row | peaks | {"against": "dense logits, cross_entropy of both directions"}


def _row(tensors: tuple[Tensor, Tensor, Tensor], times: tuple[float, float]) -> dict:
    """Least bytes: the features and their gradients once. FLOPs: those of the dense form, 6 B^2 E."""
    queries = tensors[0]
    row = bench_row("contrastive_loss_fwd_bwd", queries, times, num_bytes=4 * queries.nbytes)
    tera = 6 * queries.shape[0] * queries.numel() / 1e12
    return row | {"tflop_per_s": round(tera / times[0] * 1e3, 4)}


def inputs(shape: Shape, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and targets (B, E) and a scale (), which all need gradients."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)
    queries, targets = (
        F.normalize(torch.randn(shape.batch, shape.embed_dim, generator=generator, device=device), dim=1)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    )
    return queries, targets, torch.tensor(20.0, device=device, requires_grad=True)


def run_ours(queries: Tensor, targets: Tensor, scale: Tensor) -> None:
    torch.autograd.grad(contrastive_loss(queries, targets, scale), (queries, targets, scale))


def run_dense(queries: Tensor, targets: Tensor, scale: Tensor) -> None:
    logits = scale.to(queries.dtype) * queries @ targets.T
    labels = torch.arange(len(queries), device=queries.device)
    loss = F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(logits.T, labels, reduction="sum")
    torch.autograd.grad(0.5 * loss, (queries, targets, scale))


def make_run(name: str, shape: Shape) -> Callable[[], object]:
    """For `peak_mib`: the inputs, and one run that libraries have seen a small version of."""
    run = {"ours": run_ours, "dense": run_dense}[name]
    run(*inputs(Shape(16, 16), "cpu"))
    tensors = inputs(shape, "cpu")
    return lambda: run(*tensors)
