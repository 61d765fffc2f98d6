"""Attention of the trunk: packed streams in training, padded batches and a key-value cache in generation.

Registered in transformers as `attn_implementation="trichord"`, for attention **and** for masks: with the first alone
transformers builds no mask for left-padded batches, and `generate()` is silently wrong.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "trichord"
_SLACK_CHUNK = 128  # slack attends only within pieces of this many tokens: nobody reads the result


@dataclass(frozen=True)
class Run:
    """A contiguous piece of the stream that attends only to itself. `mask` (L, L) bool; None: plainly causal."""

    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class PackedLayout:
    """Who sees whom in a packed stream: query t sees key j of its own run with j < max(t + 1, span_ends[t]).

    `runs` on the CPU, where reading sizes is free; `mask` (1, 1, T, T) bool on other devices, where reading them
    would stall the queue. The dense mask costs T^2 bytes and no sparsity: it is the plain-torch path, not a kernel.
    """

    runs: tuple[Run, ...] | None
    mask: Tensor | None

    @staticmethod
    def build(cu_seqlens: Tensor, segment_ids: Tensor, span_ends: Tensor | None) -> PackedLayout:
        """cu_seqlens (C+1,), segment_ids (T,), span_ends (T,) or None for causal throughout; integers, one device."""
        if segment_ids.device.type == "cpu":
            return PackedLayout(tuple(_build_runs(cu_seqlens, segment_ids, span_ends)), None)
        return PackedLayout(None, _dense_mask(cu_seqlens, segment_ids.shape[0], span_ends))


def _build_runs(cu_seqlens: Tensor, segment_ids: Tensor, span_ends: Tensor | None) -> list[Run]:
    bounds = cu_seqlens.tolist()
    is_slack = (segment_ids < 0).tolist()
    after_self = torch.arange(1, segment_ids.shape[0] + 1)
    visible_until = after_self if span_ends is None else torch.maximum(span_ends, after_self)
    looks_ahead = visible_until > after_self
    runs: list[Run] = []
    for start, end in itertools.pairwise(bounds):
        if start == end:
            continue
        if is_slack[start]:
            runs += [Run(min(_SLACK_CHUNK, end - at), None) for at in range(start, end, _SLACK_CHUNK)]
        elif not bool(looks_ahead[start:end].any()):
            runs.append(Run(end - start, None))
        else:
            runs.append(Run(end - start, torch.arange(start, end) < visible_until[start:end, None]))
    return runs


def _dense_mask(cu_seqlens: Tensor, num_tokens: int, span_ends: Tensor | None) -> Tensor:
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    run = torch.searchsorted(cu_seqlens[1:].long(), position, right=True)
    visible_until = position + 1 if span_ends is None else torch.maximum(span_ends.long(), position + 1)
    return ((run[:, None] == run[None, :]) & (position[None, :] < visible_until[:, None]))[None, None]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None) -> Tensor:
    """query (1, N, T, H), key and value (1, K, T, H) -> (1, N, T, H). N is a multiple of K (grouped queries)."""
    grouped = query.shape[1] != key.shape[1]
    if layout.mask is not None:
        return _sdpa(query, key, value, layout.mask, scaling, grouped)
    assert layout.runs is not None
    # split, not slices: the gradient of a split is one concatenation, that of each slice a tensor of the full size
    lengths = [run.length for run in layout.runs]
    pieces = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))
    out = [_sdpa(q, k, v, run.mask, scaling, grouped) for run, (q, k, v) in zip(layout.runs, pieces)]
    return torch.cat(out, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, grouped: bool) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def trichord_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The attention function transformers calls. query (B, N, L, H) -> (B, L, N, H).

    With `packed_layout` (a keyword argument of the model's forward, batch size 1) the packed rule holds and
    `attention_mask` is ignored; without it this is transformers' SDPA path: padding masks and caches.
    """
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a packed stream has batch size 1 and no cache, got batch {query.shape[0]}, "
            f"{query.shape[2]} queries, {key.shape[2]} keys"
        )
    return packed_attention(query, key, value, packed_layout, scaling).transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Make `attn_implementation="trichord"` known to transformers. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, trichord_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
