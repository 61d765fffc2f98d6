"""Padded prompts: the same positions and masks as the packed stream of training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_trichord import Item, tiny_batch, tiny_parts

from trichord.batches.interleave import StreamArrays, segment_length
from trichord.fusion.prompt import expand_items, image_blocks, pad_left, prefill_mask, prompt_positions

LAYOUTS = [((2, 3), 4, 2, 3), ((3, 2), None, 0, None), (None, 5, 1, 2), (None, None, 0, 4), ((1, 1), None, 3, 1)]


@pytest.mark.parametrize(("grid", "audio", "prompt", "text"), LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_are_those_of_training(grid, audio, prompt, text, side):
    parts = tiny_parts(grid, audio, [9] * prompt, None if text is None else [9] * text)
    arrays = StreamArrays(segment_length(parts), pad_id=0, image_id=4, audio_id=5)
    arrays.write(0, parts, 0)
    row, padding = torch.from_numpy(arrays.input_ids), torch.zeros(3, dtype=torch.int64)
    pieces = (padding, row) if side == "left" else (row, padding)
    mask = torch.cat([(piece != 0).long() for piece in pieces])[None]
    got = prompt_positions(torch.cat(pieces)[None], mask, 4, grid)
    assert got.dtype == torch.float32
    assert np.array_equal(got[:, 0, mask[0].bool()].numpy(), arrays.positions)
    assert not got[:, 0, ~mask[0].bool()].any()


def test_two_images_in_succession_and_text_between():
    row = torch.tensor([[1, 4, 4, 4, 4, 9, 4, 4]])  # three images of 1 x 2, the first two touching
    assert prompt_positions(row, None, 4, (1, 2))[:, 0].tolist() == [
        [0, 1, 1, 3, 3, 5, 6, 6],
        [0, 1, 1, 3, 3, 5, 6, 6],
        [0, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert image_blocks(row, 4, 2).tolist() == [[-1, 0, 0, 1, 1, -1, 2, 2]]


@pytest.mark.parametrize(
    ("grid", "message"),
    [((2, 2), "3 image tokens: expected a multiple of 4"), (None, "expected none, without a tower")],
)
def test_torn_images_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        prompt_positions(torch.tensor([[4, 4, 4]]), None, 4, grid)


def test_the_prefill_mask_is_the_rule_of_the_packed_stream():
    batch = tiny_batch([Item(image=True, audio=900, text=3)], num_tokens=1)
    length = batch.input_ids.shape[0]
    blocks = image_blocks(batch.input_ids[None], 4, 9)
    mask = prefill_mask(blocks, torch.ones(1, length), 0)[0, 0]
    until = torch.maximum(batch.span_ends, torch.arange(1, length + 1))
    assert torch.equal(mask, torch.arange(length) < until[:, None])


def test_the_prefill_mask_knows_padding_and_the_cache():
    blocks = image_blocks(torch.tensor([[9, 4, 4]]), 4, 2)
    mask = prefill_mask(blocks, torch.tensor([[0, 1, 1, 1, 1]]), 2)[0, 0]
    assert mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]


def test_padding_and_expansion():
    ids, mask = pad_left([[7, 8], [9]], 0)
    assert ids.tolist() == [[7, 8], [0, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]
    assert expand_items(torch.tensor([1, 2, 3]), [2, 0, 1], 2).tolist() == [1, 2, 1, 2, 3, 3]
