"""Items of different lengths as one padded batch, and back. Lengths are host integers: nothing waits for the device.

Shapes: I items, L the longest length, R the sum of all lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor on `device`, without waiting for the device."""
    # An explicit "cpu" first: under a meta-device context the numbers would be lost.
    return torch.tensor(values, dtype=torch.int64, device="cpu").to(device, non_blocking=True)


def length_mask(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor:
    """(I, L) bool, true inside each item."""
    return torch.arange(longest, device=device) < to_device(lengths, device)[:, None]


def key_mask(lengths: Sequence[int], longest: int, device: torch.device) -> Tensor | None:
    """(I, 1, 1, L) bool for attention over padded items; None where nothing is padded.

    An empty item keeps its first key visible: a softmax over nothing would be NaN.
    """
    visible = [max(1, length) for length in lengths]
    if min(visible) == longest:
        return None
    return length_mask(visible, longest, device)[:, None, None, :]


def flatten_items(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """(I, L, D) -> (R, D): the real positions, item by item."""
    longest = padded.shape[1]
    if all(length == longest for length in lengths):
        return padded.flatten(0, 1)
    index = torch.cat([torch.arange(i * longest, i * longest + n, device="cpu") for i, n in enumerate(lengths)])
    return padded.flatten(0, 1).index_select(0, index.to(padded.device, non_blocking=True))


def masked_mean(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """(I, L, D) -> (I, D) fp32: the mean over each item's real positions; 0 for an empty item."""
    mask = length_mask(lengths, padded.shape[1], padded.device)
    count = to_device([max(1, length) for length in lengths], padded.device)
    total = padded.float().masked_fill(~mask[:, :, None], 0.0).sum(1)
    return total / count[:, None]
