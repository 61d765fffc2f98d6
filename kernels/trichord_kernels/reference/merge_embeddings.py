"""Rows of one tensor put in the place of rows of another: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_embeddings(embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """`out = embeds`, then `out[positions[m]] = features[m]` for every m with positions[m] >= 0; a new tensor.

    Shapes and dtypes as the public `trichord_kernels.merge_embeddings`; any dtype is allowed here. Reads `positions` on
    the host, which costs nothing on a CPU: one outside the stream, or one that comes twice, is a ValueError.
    """
    check_operands(embeds, features, positions)
    placed = check_positions(positions, embeds.shape[0])
    if placed is not None:
        features, positions = features.index_select(0, placed), positions.index_select(0, placed)
    return embeds.index_copy(0, positions.long(), features)


def check_operands(embeds: Tensor, features: Tensor, positions: Tensor) -> None:
    """Raise ValueError unless the shapes and dtypes fit together (both paths refuse the same mistakes)."""
    if embeds.dim() != 2 or features.dim() != 2 or embeds.shape[1] != features.shape[1]:
        raise ValueError(
            f"merge_embeddings: expected embeds (T, D) and features (M, D), got {tuple(embeds.shape)} and "
            f"{tuple(features.shape)}; flatten the leading axes and project the features to the stream's width"
        )
    if features.dtype != embeds.dtype:
        raise ValueError(
            f"merge_embeddings: expected features in the dtype of embeds ({embeds.dtype}), got {features.dtype}; "
            "cast the features"
        )
    if positions.shape != features.shape[:1]:
        raise ValueError(
            f"merge_embeddings: expected one position per feature row, ({features.shape[0]},), got "
            f"{tuple(positions.shape)}; select the features that have a place"
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"merge_embeddings: expected positions in int32 or int64, got {positions.dtype}; cast them")


def check_positions(positions: Tensor, num_rows: int) -> Tensor | None:
    """Raise ValueError for a position outside the stream or given twice. Returns the numbers of the features that are
    placed, or None where all are. Reads values, so for tensors on a CPU."""
    if not positions.numel():
        return None
    least, most = (int(value) for value in positions.aminmax())
    if most >= num_rows:
        raise ValueError(
            f"merge_embeddings: expected positions below the {num_rows} rows of embeds, got {most}; count positions "
            "from the start of the stream"
        )
    placed = (positions >= 0).nonzero()[:, 0] if least < 0 else None
    index = (positions if placed is None else positions.index_select(0, placed)).long()
    if int(torch.zeros(num_rows, dtype=torch.bool).index_fill_(0, index, True).sum()) != index.shape[0]:
        repeated = int(index.bincount().argmax())
        raise ValueError(
            f"merge_embeddings: expected distinct positions, got {repeated} more than once; one row has one place"
        )
    return placed
