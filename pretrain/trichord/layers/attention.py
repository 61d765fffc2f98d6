"""Attention of any transformers model through our kernels: packed streams, padded batches, key-value caches.

Registered in transformers as `attn_implementation="trichord"`, for attention **and** for masks: with the first alone
transformers builds no mask for left-padded batches, and `generate()` is silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trichord.layers.layout import PackedLayout
from trichord.layers.sequence import SequenceGroup
from trichord_kernels import attention

NAME = "trichord"
_NOT_OFFERED = ("s_aux", "position_bias", "cache")  # sinks, additive biases, paged caches of continuous batching


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scaling: float | None, **options: Any
) -> Tensor:
    """query (B, N, L, H), key and value (B, K, L, H) -> (B, L, N, H). N is a multiple of K (grouped queries).

    options: `softcap`, `dropout` of `trichord_kernels.attention`.
    """
    batch, _, length, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return attend(q, k, v, layout, scaling, **options).unflatten(0, (batch, length))


def attend(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, scaling: float | None, **options: Any) -> Tensor:
    """q (T, N, H), k and v (T, K, H) of the layout's tokens -> (T, N, H)."""
    return attention(
        q,
        k,
        v,
        layout.cu_seqlens,
        causal=layout.causal,
        span_ends=layout.span_ends,
        window=layout.window,
        scale=scaling,
        seqused_k=layout.seqused_k,
        **options,
    )


def trichord_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PackedLayout | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls. query (B, N, L, H) -> (B, L, N, H).

    Our kernels run where a `PackedLayout` says who sees whom: `packed_layout`, a keyword argument of the model's
    forward (batch size 1; where `sequence_group` is given too, the stream lies over its ranks); the mask function's
    answer (`masks.py`), which covers padding on either side and packed rows; `cu_seq_lens_q`, which transformers'
    flattening collator gives; or no mask at all. A dense mask comes with key-value caches and kinds that no layout
    describes; it goes to torch's own attention, on a GPU too: a decoding step has one query per row, and tiles of
    queries have nothing to gain there.

    Raises:
        ValueError: an argument that changes the result and is not offered here, or a mask that is not 4-D.
    """
    for name in _NOT_OFFERED:
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="{NAME}" does not offer {name}; use another implementation')
    group: SequenceGroup | None = kwargs.get("sequence_group")
    if group is not None:
        return _shared_attention(group, query, key, value, kwargs["packed_layout"], scaling, softcap, dropout), None
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    layout = _find_layout(query, key, attention_mask, causal, kwargs)
    if layout is not None:
        return packed_attention(query, key, value, layout, scaling, softcap=softcap, dropout=dropout), None
    assert not isinstance(attention_mask, PackedLayout)
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f'attn_implementation="{NAME}": expected a mask of 4 dimensions, got {tuple(attention_mask.shape)}; call '
            "register_attention() before the model is built, and let the model make its masks"
        )
    if softcap is not None:
        return _capped_attention(query, key, value, attention_mask, causal, scaling, softcap, dropout), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal
    )


def _shared_attention(
    group: SequenceGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """query (1, N, T / P, H), key and value (1, K, T / P, H) of this rank's tokens -> (1, T / P, N, H)."""
    q, k, v = group.to_heads(*(t[0].transpose(0, 1) for t in (query, key, value)))
    return group.to_tokens(attend(q, k, v, layout, scaling, softcap=softcap, dropout=dropout))[None]


def _find_layout(
    query: Tensor, key: Tensor, mask: PackedLayout | Tensor | None, causal: bool, kwargs: dict[str, Any]
) -> PackedLayout | None:
    """The layout that describes this call, or None where a dense mask or a cache does."""
    batch, _, length, _ = query.shape
    packed, cu_seqlens = kwargs.get("packed_layout"), kwargs.get("cu_seq_lens_q")
    if packed is not None and (batch != 1 or length != key.shape[2]):
        raise ValueError(
            f"a packed stream has batch size 1 and no cache, got batch {batch}, {length} queries, {key.shape[2]} keys"
        )
    if packed is not None:
        return packed
    if cu_seqlens is not None and length == key.shape[2] and (mask is None or _is_unpadded(mask)):
        # A mask made with a cache in the arguments knows nothing of the sequences, but it does know the window. Without
        # one, the argument says it; it counts the query itself as ours does, but on encoders it means something else.
        window = mask.window if isinstance(mask, PackedLayout) else kwargs.get("sliding_window") if causal else None
        return PackedLayout(cu_seqlens.to(torch.int32), None, None, causal, window)
    if isinstance(mask, PackedLayout):
        return mask
    return (
        PackedLayout.of_rows(batch, length, query.device, causal) if mask is None and length == key.shape[2] else None
    )


def _is_unpadded(mask: PackedLayout | Tensor) -> bool:
    return isinstance(mask, PackedLayout) and mask.seqused_k is None


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Softcap with a dense mask, which torch's attention does not offer: all scores at once, for decoding steps.

    query (B, N, L, H), key and value (B, K, M, H), mask (B or 1, 1, L, M) bool -> (B, L, N, H)."""
    if dropout:
        raise ValueError(f'attn_implementation="{NAME}": expected dropout 0 with softcap, got {dropout}')
    length, num_keys = query.shape[2], key.shape[2]
    if mask is None and causal and length > 1:  # an empty static cache: its keys are the first ones
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=query.device).tril()
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (F.softmax(scores, dim=-1).to(value.dtype) @ value).transpose(1, 2).contiguous()


def register_attention() -> None:
    """Make `attn_implementation="trichord"` known to transformers. Idempotent."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from trichord.layers.masks import trichord_mask

    AttentionInterface.register(NAME, trichord_attention)
    AttentionMaskInterface.register(NAME, trichord_mask)
