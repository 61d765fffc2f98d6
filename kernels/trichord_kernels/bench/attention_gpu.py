"""Attention on a GPU against SDPA, FlexAttention, varlen_attn and flash-attn, per kind of mask. Not yet run on a GPU.

bf16, 16,384 packed tokens, 32 query heads on 8 key heads. TFLOP/s count the pairs that see each other, so a contestant
that computes masked pairs, too, pays for them: 4 H FLOPs per pair and head forward, 3.5 times that with the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels.bench.memory import gpu_peak_mib
from trichord_kernels.bench.timing import Run, absent_row, bench_row, contestants, median_ms

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS = 16384, 32, 8

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # packed (T, N, H), (T, K, H) twice -> (T, N, H)


@dataclass(frozen=True)
class Mask:
    """Causal over equal segments; `num_spans` spans of `span` tokens, spread evenly, see themselves whole."""

    name: str
    segments: int = 1
    window: int | None = None
    num_spans: int = 0
    span: int = 0

    @property
    def length(self) -> int:
        return NUM_TOKENS // self.segments

    @property
    def pairs(self) -> int:
        """(query, key) pairs that see each other. Windows and spans do not go together here."""
        reach = min(self.window or self.length, self.length)
        own = self.length * reach - reach * (reach - 1) // 2
        return self.segments * own + self.num_spans * self.span * (self.span - 1) // 2

    def cu_seqlens(self, device: torch.device) -> Tensor:
        return torch.arange(0, NUM_TOKENS + 1, self.length, device=device, dtype=torch.int32)

    def span_ends(self, device: torch.device) -> Tensor | None:
        """(T,) int32 as `attention` takes it; None without spans."""
        if not self.num_spans:
            return None
        ends = torch.arange(1, NUM_TOKENS + 1, device=device, dtype=torch.int32)
        stride = NUM_TOKENS // self.num_spans
        for begin in range(0, NUM_TOKENS, stride):
            ends[begin : begin + self.span] = begin + self.span
        return ends


MASKS = (
    Mask("causal"),
    Mask("documents", segments=8),
    Mask("window", window=1024),
    Mask("image_spans", num_spans=8, span=1024),
)


def rows(device: torch.device, repeats: int) -> list[dict]:
    """Forward, and forward with backward, per mask and head dim, one row per contestant."""
    return [
        row
        for head_dim in (64, 128)
        for mask in MASKS
        for backward in (False, True)
        for row in _rows(device, repeats, mask, head_dim, backward)
    ]


def _rows(device: torch.device, repeats: int, mask: Mask, head_dim: int, backward: bool) -> list[dict]:
    q, k, v, grad = (
        torch.randn(NUM_TOKENS, heads, head_dim, device=device, dtype=torch.bfloat16)
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    )
    for x in (q, k, v):
        x.requires_grad_(backward)

    def run_of(attend: Attend) -> Run:
        if not backward:
            return lambda: attend(q, k, v)
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    kernel = f"attention_{'fwd_bwd' if backward else 'fwd'}.{mask.name}.{head_dim}"
    num_flops = int(4 * head_dim * NUM_HEADS * mask.pairs * (3.5 if backward else 1))
    num_bytes = (2 * q.nbytes + k.nbytes + v.nbytes) * (2 if backward else 1)
    ours = run_of(_ours(mask, device))
    builders = {name: lambda build=build: run_of(build(mask, device)) for name, build in _OTHERS.items()}
    runs, absent = contestants(builders)
    found = []
    for name, run in runs.items():
        row = bench_row(kernel, q, median_ms(ours, run, device, repeats), num_bytes, num_flops)
        peaks = {"peak_mib": gpu_peak_mib(ours, device), "torch_peak_mib": gpu_peak_mib(run, device)}
        found.append(row | peaks | {"against": name})
    return found + [absent_row(kernel, name, why) for name, why in absent.items()]


def _ours(mask: Mask, device: torch.device) -> Attend:
    from trichord_kernels import attention

    cu_seqlens, span_ends = mask.cu_seqlens(device), mask.span_ends(device)
    return lambda q, k, v: attention(q, k, v, cu_seqlens, span_ends=span_ends, window=mask.window)


def _sdpa(mask: Mask, device: torch.device) -> Attend:
    """Segments as a batch where causal is all; else one dense boolean mask."""
    if mask.window is None and not mask.num_spans:
        return lambda q, k, v: _packed(
            F.scaled_dot_product_attention(*_batched(mask, q, k, v), is_causal=True, enable_gqa=True)
        )
    positions = torch.arange(NUM_TOKENS, device=device)
    dense = _sees(mask, device)(0, 0, positions[:, None], positions[None, :])
    return lambda q, k, v: _packed(
        F.scaled_dot_product_attention(*_batched(mask, q, k, v), attn_mask=dense, enable_gqa=True)
    )


def _flex(mask: Mask, device: torch.device) -> Attend:
    """Compiled, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    block_mask = create_block_mask(_sees(mask, device), None, None, NUM_TOKENS, NUM_TOKENS, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = compiled(q, k, v, block_mask=block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
        return out[0].transpose(0, 1)

    return attend


def _varlen(mask: Mask, device: torch.device) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    _refuse_spans(mask)
    cu_seqlens, left = mask.cu_seqlens(device), -1 if mask.window is None else mask.window - 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = mask.length
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(left, 0), enable_gqa=True)
        assert isinstance(out, Tensor)  # likewise
        return out

    return attend


def _flash(mask: Mask, device: torch.device) -> Attend:
    attend = import_module("flash_attn").flash_attn_varlen_func
    _refuse_spans(mask)
    cu_seqlens, left = mask.cu_seqlens(device), -1 if mask.window is None else mask.window - 1
    return lambda q, k, v: attend(
        q, k, v, cu_seqlens, cu_seqlens, mask.length, mask.length, causal=True, window_size=(left, 0)
    )


_OTHERS: dict[str, Callable[[Mask, torch.device], Attend]] = {
    "torch SDPA": _sdpa,
    "FlexAttention": _flex,
    "varlen_attn": _varlen,
    "flash-attn": _flash,
}


def _refuse_spans(mask: Mask) -> None:
    if mask.num_spans:
        raise ImportError("it has no mask of bidirectional spans")


def _sees(mask: Mask, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask function: (batch, head, query, key) -> bool, from the same integers as ours."""
    ends = mask.span_ends(device)
    length, window = mask.length, mask.window or NUM_TOKENS

    def sees(batch: object, head: object, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (query - key < window)
        if ends is not None:
            seen = seen | (ends[query] == ends[key])
        return seen & (query // length == key // length)

    return sees


def _batched(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, H) -> (segments, N, length, H), each."""
    q, k, v = (x.unflatten(0, (mask.segments, mask.length)).transpose(1, 2) for x in (q, k, v))
    return q, k, v


def _packed(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(0, 1)
