"""What the sweep times: per table entry the candidates, and a run on this GPU that launches the kernel with the entry.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from trichord_kernels.tables.tile import Tile

Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class SweepTarget:
    """One entry (arch at hand, *key) of tables/`op`.py's `table`. make(device) builds the inputs and returns the run,
    whose results tell whether a candidate computes the same."""

    op: str
    table: str
    key: tuple
    candidates: tuple[Tile, ...]
    make: Callable[[torch.device], Run]


def attention_targets() -> Iterator[SweepTarget]:
    """Forward, dq and dk/dv in bf16, per head dim. Mask kinds share their tiles: they bound the same loops."""
    for head_dim in (64, 80, 96, 128, 256):
        for table, is_forward in (("FORWARD", True), ("DQ", False), ("DKDV", False)):
            candidates = _candidates(head_dim, operands_held=1 if is_forward else 2)

            def make(device: torch.device, head_dim: int = head_dim, is_forward: bool = is_forward) -> Run:
                return _attention_run(device, head_dim, is_forward)

            yield SweepTarget("attention", table, (head_dim, 2), candidates, make)


def contrastive_loss_targets() -> Iterator[SweepTarget]:
    """Both passes in bf16 at 16,384 x 16,384, per number of features held whole; 0 stands for features in blocks."""
    for features, (table, is_forward) in product((64, 128, 256, 0), (("FORWARD", True), ("BACKWARD", False))):

        def make(device: torch.device, features: int = features or 1024, is_forward: bool = is_forward) -> Run:
            return _contrastive_run(device, features, is_forward)

        candidates = _candidates(features or 64, operands_held=1)
        yield SweepTarget("contrastive_loss", table, ("half", features), candidates, make)


TARGETS: dict[str, Callable[[], Iterator[SweepTarget]]] = {
    "attention": attention_targets,
    "contrastive_loss": contrastive_loss_targets,
}


def _candidates(columns: int, operands_held: int) -> tuple[Tile, ...]:
    """Tiles whose operands in half precision, `operands_held` of block_m rows and two pipelined ones of block_n, fit
    the largest shared memory; 8 warps from 128 rows on. What this GPU cannot hold drops out when it is launched."""
    found = []
    for block_m, block_n, num_warps, num_stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        shared_kib = (operands_held * block_m + 2 * num_stages * block_n) * columns * 2 / 1024
        if shared_kib <= 227 and (num_warps == 4 or block_m == 128):
            found.append(Tile(block_m, block_n, num_warps, num_stages, "candidate"))
    return tuple(found)


def _attention_run(device: torch.device, head_dim: int, is_forward: bool) -> Run:
    """Eight causal segments of 2048 tokens, 32 query heads on 8 key heads (16 on 4 at 256)."""
    from trichord_kernels import attention

    num_heads = 16 if head_dim == 256 else 32
    q, k, v, grad = (
        torch.randn(16384, heads, head_dim, device=device, dtype=torch.bfloat16, requires_grad=not is_forward)
        for heads in (num_heads, num_heads // 4, num_heads // 4, num_heads)
    )
    cu_seqlens = torch.arange(0, 16384 + 1, 2048, device=device, dtype=torch.int32)
    if is_forward:
        return lambda: (attention(q, k, v, cu_seqlens),)
    out = attention(q, k, v, cu_seqlens)
    return lambda: torch.autograd.grad(out, (q, k, v), grad.detach(), retain_graph=True)


def _contrastive_run(device: torch.device, num_features: int, is_forward: bool) -> Run:
    from trichord_kernels import contrastive_loss

    queries, targets = (torch.randn(16384, num_features, device=device, dtype=torch.bfloat16) for _ in range(2))
    queries, targets = (
        torch.nn.functional.normalize(x, dim=1).requires_grad_(not is_forward) for x in (queries, targets)
    )
    scale = torch.full((), 20.0, device=device)
    if is_forward:
        return lambda: (contrastive_loss(queries, targets, scale),)
    loss = contrastive_loss(queries, targets, scale)
    return lambda: torch.autograd.grad(loss, (queries, targets), retain_graph=True)
