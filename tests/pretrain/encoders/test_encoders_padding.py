"""Padding items of different lengths, and taking the padding away again."""

from __future__ import annotations

import torch

from trichord.encoders.padding import flatten_items, key_mask, length_mask, masked_mean

CPU = torch.device("cpu")


def test_masks():
    assert length_mask([2, 0], 3, CPU).tolist() == [[True, True, False], [False, False, False]]
    assert key_mask([3, 3], 3, CPU) is None
    # an empty item keeps one visible key: a softmax over nothing is NaN on some devices
    assert key_mask([3, 0], 3, CPU)[:, 0, 0].tolist() == [[True, True, True], [True, False, False]]


def test_flatten_and_mean_ignore_padding_even_nan():
    padded = torch.tensor([[1.0, 2.0, torch.nan], [torch.nan] * 3, [4.0, 5.0, 6.0]])[:, :, None]
    lengths = [2, 0, 3]
    assert flatten_items(padded, lengths).flatten().tolist() == [1, 2, 4, 5, 6]
    assert masked_mean(padded, lengths).flatten().tolist() == [1.5, 0, 5]
    whole = padded[2:]
    assert flatten_items(whole, [3]).flatten().tolist() == [4, 5, 6]


def test_built_under_the_meta_device_the_numbers_stay():
    with torch.device("meta"):
        assert length_mask([1], 2, CPU).tolist() == [[True, False]]
