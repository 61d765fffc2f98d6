"""Padded prompts with images and audio in them, for generation: positions, masks, and the tensors themselves.

The same rules as the packed stream of training (batches/interleave.py), for any mixture of text, images and clips in
a row. This is not on the training path: reading values back to the host is allowed here.

Shapes: B rows, L tokens of the longest row, P = rows * columns tokens of an image, I images, A clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor


def prompt_positions(
    input_ids: Tensor, attention_mask: Tensor | None, image_id: int, grid: tuple[int, int] | None
) -> Tensor:
    """Positions (3, B, L) float32 on the axes time, height, width; 0 at padding.

    input_ids (B, L), attention_mask (B, L) with 0 at padding, on either side. Tokens advance all axes by one; an image
    that starts at p holds (p, p + row, p + column), and what follows it starts at p + max(rows, columns).

    Raises:
        ValueError: a run of image tokens is no whole number of images.
    """
    ids = input_ids.cpu().numpy()
    valid = np.ones_like(ids, dtype=bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    positions = np.zeros((3, *ids.shape), dtype=np.float32)
    for row in range(ids.shape[0]):
        is_image = ids[row, valid[row]] == image_id
        positions[:, row, valid[row]] = _row_positions(is_image, grid)
    return torch.from_numpy(positions).to(input_ids.device)


def _row_positions(is_image: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray:
    """(n,) bool -> (3, n)."""
    pieces, following = [], 0
    bounds = [0, *(np.flatnonzero(np.diff(is_image)) + 1), len(is_image)]
    for start, end in pairwise(bounds):
        if start == end:
            continue
        if not is_image[start]:
            pieces.append(np.tile(np.arange(following, following + end - start), (3, 1)))
            following += end - start
            continue
        rows, columns = grid or (0, 0)
        if grid is None or (end - start) % (rows * columns):
            expected = f"a multiple of {rows * columns}, the tokens of an image" if grid else "none, without a tower"
            raise ValueError(f"a run of {end - start} image tokens: expected {expected}")
        for _ in range((end - start) // (rows * columns)):
            axes = (np.zeros(rows * columns), np.repeat(np.arange(rows), columns), np.tile(np.arange(columns), rows))
            pieces.append(np.stack(axes) + following)
            following += max(rows, columns)
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((3, 0))


def image_blocks(input_ids: Tensor, image_id: int, tokens_per_image: int) -> Tensor:
    """(B, L) int64: the number of the image in its row that each token belongs to, -1 outside images."""
    is_image = input_ids == image_id
    number = (is_image.long().cumsum(1) - 1) // tokens_per_image
    return torch.where(is_image, number, -1)


def prefill_mask(blocks: Tensor, attention_mask: Tensor, past_length: int) -> Tensor:
    """(B, 1, L, past + L) bool: who sees whom when L new tokens follow `past_length` cached ones.

    blocks (B, L) as from `image_blocks`; attention_mask (B, past + L). Causal, but tokens of one image see each other.
    """
    length = blocks.shape[1]
    query = torch.arange(past_length, past_length + length, device=blocks.device)
    key = torch.arange(past_length + length, device=blocks.device)
    allowed = (key <= query[:, None]).expand(blocks.shape[0], -1, -1).clone()
    same_image = (blocks[:, :, None] == blocks[:, None, :]) & (blocks[:, :, None] >= 0)
    allowed[:, :, past_length:] |= same_image
    return (allowed & attention_mask.bool()[:, None, :])[:, None]


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token rows -> input_ids (B, L) and attention_mask (B, L), both int64, padding in front."""
    longest = max(map(len, rows))
    ids = [[pad_id] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def pad_waveforms(waveforms: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips (n,) int16 -> (A, N) int16 and their lengths (A,) int64."""
    lengths = torch.tensor([clip.shape[0] for clip in waveforms])
    return torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True), lengths


def expand_items(items: Tensor, counts: Sequence[int], times: int) -> Tensor:
    """Items of all rows, `counts[b]` of row b, for a batch in which each row comes `times` times in succession."""
    pieces = [piece for piece in items.split(list(counts)) for _ in range(times)]
    return torch.cat(pieces) if pieces else items
