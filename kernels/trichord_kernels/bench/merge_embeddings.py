"""Embedding merge, against the masked_scatter that transformers' models use."""

from __future__ import annotations

import torch
from torch import Tensor

from trichord_kernels import merge_embeddings
from trichord_kernels.bench.timing import bench_row, median_ms


def rows(device: torch.device, repeats: int) -> list[dict]:
    return [bench_merge(device, repeats), bench_merge_backward(device, repeats)]


def bench_merge(device: torch.device, repeats: int) -> dict:
    """Forward; half of the stream's rows are features."""
    embeds, features, positions, mask = _inputs(device)

    def plain() -> Tensor:
        return embeds.masked_scatter(mask[:, None], features)

    with torch.no_grad():
        times = median_ms(lambda: merge_embeddings(embeds, features, positions), plain, device, repeats)
    return bench_row("merge_embeddings_fwd", embeds, times, num_bytes=2 * embeds.nbytes)


def bench_merge_backward(device: torch.device, repeats: int) -> dict:
    """Forward and backward with gradients of embeds and features."""
    embeds, features, positions, mask = _inputs(device)
    leaves = embeds.requires_grad_(), features.requires_grad_()
    grad = torch.randn_like(embeds)

    def ours() -> None:
        torch.autograd.grad(merge_embeddings(*leaves, positions), leaves, grad)

    def plain() -> None:
        torch.autograd.grad(embeds.masked_scatter(mask[:, None], features), leaves, grad)

    times = median_ms(ours, plain, device, repeats)
    # Forward 2; backward reads each row of grad once, writes embeds' gradient and the features'.
    return bench_row("merge_embeddings_fwd_bwd", embeds, times, num_bytes=4 * embeds.nbytes + features.nbytes)


def _inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_rows, width), dtype = (
        ((16384, 4096), torch.bfloat16) if device.type == "cuda" else ((4096, 512), torch.float32)
    )
    embeds, features = (torch.randn(n, width, device=device, dtype=dtype) for n in (num_rows, num_rows // 2))
    positions = torch.randperm(num_rows, device=device)[: num_rows // 2].sort().values.int()
    mask = torch.zeros(num_rows, dtype=torch.bool, device=device).index_fill_(0, positions.long(), True)
    return embeds, features, positions, mask
