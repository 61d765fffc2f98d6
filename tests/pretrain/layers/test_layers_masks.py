"""Which masks become layouts, and that a layout is the mask it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from trichord.layers.layout import PackedLayout
from trichord.layers.masks import trichord_mask
from trichord_kernels.reference.visibility import key_intervals

ROWS, LENGTH = 3, 7
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]])
SEQUENCES = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 2, 2, 2, 2, 2]])
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0] * 7])
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7, [0] * 7])
BOTH = torch.tensor([[0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0]])
HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [1] * 7, [1] * 7])
WINDOWED = sliding_window_causal_mask_function(3)


def dense(layout: PackedLayout) -> torch.Tensor:
    """(B, 1, L, L) bool, from the rule that defines our attention."""
    first, last = key_intervals(
        ROWS * LENGTH,
        layout.cu_seqlens,
        causal=layout.causal,
        window=layout.window,
        seqused_k=layout.seqused_k,
    )
    keys = torch.arange(ROWS * LENGTH)
    seen = (keys >= first[:, None]) & (keys < last[:, None])
    blocks = seen.reshape(ROWS, LENGTH, ROWS, LENGTH)
    for a, b in itertools.permutations(range(ROWS), 2):
        assert not blocks[a, :, b].any()
    return torch.stack([blocks[row, :, row] for row in range(ROWS)])[:, None]


def call(make, function, padding=None, **options):
    arguments = {"batch_size": ROWS, "q_length": LENGTH, "kv_length": LENGTH, "mask_function": function}
    padding = None if padding is None else padding.bool()
    return make(**arguments, attention_mask=padding, **options)


@pytest.mark.parametrize(
    "function",
    [
        causal_mask_function,
        WINDOWED,
        packed_sequence_compatibility_function(causal_mask_function, POSITIONS, SEQUENCES),
        packed_sequence_compatibility_function(WINDOWED, POSITIONS, SEQUENCES),
        bidirectional_mask_function,
    ],
    ids=["causal", "window", "packed", "packed_window", "bidirectional"],
)
@pytest.mark.parametrize("padding", [None, LEFT, RIGHT, BOTH, HOLES], ids=["none", "left", "right", "both", "holes"])
def test_a_layout_is_the_mask_it_stands_for(function, padding):
    """Where it is a layout; whatever comes back describes the same mask as transformers' own."""
    got = call(trichord_mask, function, padding, allow_is_causal_skip=False)
    want = call(sdpa_mask, function, padding, allow_is_causal_skip=False)
    if isinstance(got, PackedLayout):
        got = dense(got)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("function", "padding", "is_layout"),
    [
        (causal_mask_function, None, True),
        (causal_mask_function, BOTH, True),
        (causal_mask_function, HOLES, False),
        (WINDOWED, LEFT, True),
        (bidirectional_mask_function, RIGHT, True),
        (bidirectional_mask_function, LEFT, False),
        (packed_sequence_compatibility_function(WINDOWED, POSITIONS, SEQUENCES), None, True),
        (packed_sequence_compatibility_function(WINDOWED, POSITIONS, SEQUENCES), RIGHT, False),
        (sliding_window_bidirectional_mask_function(3), None, False),
        (chunked_causal_mask_function(3, torch.zeros(ROWS, dtype=torch.long)), None, False),
        (or_masks(causal_mask_function, blockwise_overlay(SEQUENCES)), None, False),
        (and_masks(causal_mask_function, blockwise_overlay(SEQUENCES)), None, False),
    ],
)
def test_what_is_recognised(function, padding, is_layout):
    """Fails where transformers changes how it builds masks: the dense mask is right then, but slow."""
    assert isinstance(call(trichord_mask, function, padding), PackedLayout) == is_layout


@pytest.mark.parametrize(
    "change", [{"q_length": 1}, {"q_offset": 2}, {"q_offset": torch.tensor(0)}, {"kv_offset": 1}, {"use_vmap": True}]
)
def test_caches_and_functions_of_a_caller_get_the_dense_mask(change):
    arguments = {"batch_size": ROWS, "q_length": LENGTH, "kv_length": LENGTH, "allow_is_causal_skip": False, **change}
    assert trichord_mask(**arguments).shape == (ROWS, 1, arguments["q_length"], LENGTH)
