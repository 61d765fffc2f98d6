"""Splicing: feature tokens take the places that the packed stream keeps for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trichord_kernels import merge_embeddings


def rows_in_stream(counts: Sequence[int], lengths: Sequence[int], what: str) -> list[int]:
    """Row numbers, in the flat (R, D) features of all items, of the items that are in the stream.

    counts: tokens of each item in the stream; lengths: tokens the encoder made of it.

    Raises:
        ValueError: an item is in the stream with another number of tokens than the encoder makes of it.
    """
    rows: list[int] = []
    start = 0
    for number, (count, length) in enumerate(zip(counts, lengths)):
        if count not in (0, length):
            raise ValueError(f"{what} {number} has {count} places in the stream, but the encoder made {length} tokens")
        if count:
            rows.extend(range(start, start + length))
        start += length
    return rows


def splice(embeds: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """embeds (T, D) with its rows `index` (R,) replaced by features (R, D); a new tensor.

    index is int32 or int64, without a row twice; below 0 means no place. With R = 0 both operands stay in the graph: a
    module without items still runs backwards.
    """
    return merge_embeddings(embeds, features.to(embeds.dtype), index)


def select_rows(features: Tensor, rows: Sequence[int]) -> Tensor:
    """features (R, D) -> the given rows; rows are host ints, ascending."""
    if len(rows) == features.shape[0]:
        return features
    return features.index_select(
        0, torch.tensor(rows, dtype=torch.int64, device="cpu").to(features.device, non_blocking=True)
    )
