"""Splicing features into the stream."""

from __future__ import annotations

import pytest
import torch

from trichord.fusion.splice import rows_in_stream, select_rows, splice


def test_features_take_their_places_and_gradients_follow():
    embeds = torch.zeros(6, 2, requires_grad=True)
    features = torch.ones(2, 2, requires_grad=True)
    out = splice(embeds, features, torch.tensor([4, 1], dtype=torch.int32))
    assert out[:, 0].tolist() == [0, 1, 0, 0, 1, 0]
    (out * torch.arange(6.0)[:, None]).sum().backward()
    assert embeds.grad[:, 0].tolist() == [0, 0, 2, 3, 0, 5]
    assert features.grad[:, 0].tolist() == [4, 1]


def test_nothing_to_splice_keeps_the_features_in_the_graph():
    features = torch.ones(0, 2, requires_grad=True)
    splice(torch.zeros(3, 2), features, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert features.grad is not None


def test_features_take_the_dtype_of_the_stream():
    features = torch.full((1, 2), 1.5, requires_grad=True)
    out = splice(torch.zeros(3, 2, dtype=torch.bfloat16), features, torch.tensor([1]))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert features.grad.dtype == torch.float32
    assert features.grad.tolist() == [[1, 1]]


@pytest.mark.parametrize("index", [[0, 3], [2, 2]])
def test_a_place_outside_the_stream_or_taken_twice_is_refused(index):
    with pytest.raises(ValueError, match="merge_embeddings: expected"):
        splice(torch.zeros(3, 2), torch.ones(2, 2), torch.tensor(index))


def test_items_outside_the_stream_are_passed_over():
    assert rows_in_stream([2, 0, 3], [2, 4, 3], "clip") == [0, 1, 6, 7, 8]
    features = torch.arange(9.0)[:, None]
    assert select_rows(features, [0, 1, 6]).flatten().tolist() == [0, 1, 6]
    assert select_rows(features, list(range(9))) is features


def test_a_wrong_count_is_named():
    with pytest.raises(ValueError, match="clip 1 has 3 places in the stream, but the encoder made 4 tokens"):
        rows_in_stream([2, 3], [2, 4], "clip")
