"""Attention over packed segments: on a CPU against torch's own attention with one dense mask, forward and backward.

GPU rows, against more contestants, are those of `attention_gpu.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels import attention, gated_cross_attention
from trichord_kernels.bench import attention_gpu
from trichord_kernels.bench.timing import bench_row, median_ms
from trichord_kernels.reference.visibility import key_intervals

NUM_TOKENS, NUM_SEGMENTS = 4096, 16
QUICK_TOKENS = 1024  # fewer than 5 repeats: a look whether it runs
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
WINDOW = 64
_CPU_TURNS = 3  # the dense run takes a second: more turns than that tell nothing new

MASKS = ("causal", "image_spans", "window")


def rows(device: torch.device, repeats: int) -> list[dict]:
    if device.type == "cuda":
        return attention_gpu.rows(device, repeats)
    num_tokens = NUM_TOKENS if repeats >= 5 else QUICK_TOKENS
    return [*(_packed_row(device, num_tokens, mask) for mask in MASKS), _gated_row(device, num_tokens)]


def _packed_row(device: torch.device, num_tokens: int, mask: str) -> dict:
    """Self-attention of segments of unequal length: ours, and SDPA with the same visibility as a (T, T) mask."""
    q, k, v, grad = operands(num_tokens, num_tokens, device)
    cu_seqlens = boundaries(num_tokens, device)
    options = {
        "span_ends": image_spans(cu_seqlens, num_tokens) if mask == "image_spans" else None,
        "window": WINDOW if mask == "window" else None,
    }
    seen = dense_mask(num_tokens, key_intervals(num_tokens, cu_seqlens, **options))
    times = median_ms(
        lambda: torch.autograd.grad(attention(q, k, v, cu_seqlens, **options), (q, k, v), grad),
        lambda: torch.autograd.grad(dense_attention(q, k, v, seen), (q, k, v), grad),
        device,
        _CPU_TURNS,
    )
    return _row(f"attention_fwd_bwd.{mask}", q, k, seen, times)


def _gated_row(device: torch.device, num_tokens: int) -> dict:
    """Gated cross-attention: every segment looks at 64 features of its own."""
    num_keys = NUM_SEGMENTS * 64
    q, k, v, grad = operands(num_tokens, num_keys, device)
    hidden, gate = torch.randn_like(q).requires_grad_(), torch.randn(NUM_HEADS, device=device, requires_grad=True)
    cu_seqlens = boundaries(num_tokens, device)
    cu_seqlens_k = torch.arange(0, num_keys + 1, 64, device=device, dtype=torch.int32)
    seen = dense_mask(num_keys, key_intervals(num_tokens, cu_seqlens, cu_seqlens_k, causal=False))
    leaves = (hidden, q, k, v, gate)

    def plain() -> None:
        out = hidden + torch.tanh(gate)[:, None] * dense_attention(q, k, v, seen)
        torch.autograd.grad(out, leaves, grad)

    times = median_ms(
        lambda: torch.autograd.grad(gated_cross_attention(*leaves, cu_seqlens, cu_seqlens_k), leaves, grad),
        plain,
        device,
        _CPU_TURNS,
    )
    return _row("attention_gated_cross_fwd_bwd", q, k, seen, times)


def _row(kernel: str, q: Tensor, k: Tensor, seen: Tensor, times: tuple[float, float]) -> dict:
    """Bytes: operands and results of both passes once. FLOPs: of the pairs that see each other, seven products."""
    num_flops = 14 * HEAD_DIM * NUM_HEADS * int(seen.sum())
    row = bench_row(kernel, q, times, num_bytes=4 * (q.nbytes + k.nbytes), num_flops=num_flops)
    return row | {"note": f"{row['note']}; {NUM_SEGMENTS} segments against SDPA with a dense mask"}


def operands(num_queries: int, num_keys: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (Tq, N, H), k and v (Tk, K, H), all with gradients, and an incoming gradient like q."""
    shapes = ((num_queries, NUM_HEADS), (num_keys, NUM_KV_HEADS), (num_keys, NUM_KV_HEADS))
    q, k, v = (torch.randn(*shape, HEAD_DIM, device=device, requires_grad=True) for shape in shapes)
    return q, k, v, torch.randn_like(q)


def boundaries(num_tokens: int, device: torch.device) -> Tensor:
    """Equal segments with each inner boundary moved by up to a quarter of a segment."""
    length = num_tokens // NUM_SEGMENTS
    bounds = torch.arange(0, num_tokens + 1, length)
    shift = torch.randint(-length // 4, length // 4, (NUM_SEGMENTS - 1,), generator=torch.Generator().manual_seed(0))
    bounds[1:-1] += shift
    return bounds.to(device, torch.int32)


def image_spans(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """A span of a quarter of a segment at the start of every segment, in the form `attention` takes."""
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    begin = cu_seqlens[:-1].long()[torch.searchsorted(cu_seqlens[1:].long(), position, right=True)]
    end = begin + num_tokens // NUM_SEGMENTS // 4
    return torch.where(position < end, end, position + 1).int()


def dense_mask(num_keys: int, intervals: tuple[Tensor, Tensor]) -> Tensor:
    """(T, keys) bool, of the intervals that `key_intervals` gives."""
    first, last = intervals
    keys = torch.arange(num_keys, device=first.device)
    return (keys >= first[:, None]) & (keys < last[:, None])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's own attention on (T, N, H) operands with a mask (T, keys)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)
