"""The mask function transformers calls: a `PackedLayout` where one describes the mask, else transformers' dense mask.

transformers describes a mask by a function of (batch, head, query, key) index; which kind it is stands in its closure
only. What is recognised here is causal, causal with a window, bidirectional, and packed rows of causal sequences. Any
other function (image blocks of other models, chunks, masks of a caller) and every key-value cache get the dense mask,
which is right for all: a change in transformers can cost speed here, never a wrong mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trichord.layers.layout import PackedLayout


class _Kind(NamedTuple):
    causal: bool
    window: int | None
    sequence: Tensor | None  # (B, L): which sequence of its row a token belongs to


def trichord_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | PackedLayout | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> PackedLayout | Tensor | None:
    """What `trichord_attention` gets as `attention_mask`; the arguments are those of transformers' `sdpa_mask`."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, PackedLayout):  # made before the forward pass already
        return attention_mask
    mask_function = causal_mask_function if mask_function is None else mask_function
    is_plain = isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0 and q_length == kv_length and not use_vmap
    if is_plain:
        layout = _layout(mask_function, batch_size, q_length, attention_mask, torch.device(device))
        if layout is not None:
            return layout
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,  # pyright: ignore[reportArgumentType]  a tensor with a static cache
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _layout(
    mask_function: Callable, batch_size: int, length: int, padding: Tensor | None, device: torch.device
) -> PackedLayout | None:
    kind = _recognise(mask_function)
    if kind is None or (padding is not None and padding.shape != (batch_size, length)):
        return None
    if padding is None and kind.sequence is None:
        return PackedLayout.of_rows(batch_size, length, device, kind.causal, kind.window)
    if torch.compiler.is_compiling() or (padding is not None and kind.sequence is not None):
        return None  # the rest reads from the device
    if padding is not None:
        return PackedLayout.of_padding(padding.bool(), kind.causal, kind.window)
    assert kind.sequence is not None
    return PackedLayout.of_sequences(kind.sequence.expand(batch_size, -1), kind.causal, kind.window)


def _recognise(mask_function: Callable) -> _Kind | None:
    """The kind of a mask function of transformers, or None."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function is causal_mask_function:
        return _Kind(True, None, None)
    if mask_function is bidirectional_mask_function:
        return _Kind(False, None, None)
    if _name(mask_function) != "and_masks":
        return None
    parts = _enclosed(mask_function).get("mask_functions", ())
    names = [_name(part) for part in parts]
    if names == ["sliding_window_overlay", "causal_mask_function"] and parts[1] is causal_mask_function:
        return _Kind(True, _enclosed(parts[0]).get("sliding_window"), None)
    if names == ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        inner = _recognise(_enclosed(parts[1])["mask_function"])
        sequence = _enclosed(parts[0])["packed_sequence_mask"]
        return None if inner is None or inner.sequence is not None else inner._replace(sequence=sequence)
    return None


def _name(function: Callable) -> str:
    """`sliding_window_overlay` for the function that `sliding_window_overlay(...)` returned."""
    return getattr(function, "__qualname__", "").split(".")[0]


def _enclosed(function: Callable) -> dict[str, Any]:
    """The variables a function closes over, by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells))) if code and cells else {}
