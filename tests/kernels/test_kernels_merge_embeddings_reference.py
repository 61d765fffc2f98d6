"""The plain-torch embedding merge: its meaning, exact gradients, clear refusals."""

from __future__ import annotations

import pytest
import torch

from trichord_kernels.reference import merge_embeddings


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_take_their_places(index_dtype) -> None:
    embeds, features = torch.zeros(5, 2), torch.tensor([[1.0, 1], [2, 2], [3, 3]])
    out = merge_embeddings(embeds, features, torch.tensor([4, -1, 0], dtype=index_dtype))
    assert out[:, 0].tolist() == [3, 0, 0, 0, 1]
    assert not embeds.any()


def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    embeds = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for positions in ([4, 1, 0, 2], [4, -1, 0, -7], [-1, -1, -2, -3]):
        index = torch.tensor(positions)
        assert torch.autograd.gradcheck(lambda e, f, index=index: merge_embeddings(e, f, index), (embeds, features))


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_features_keep_both_in_the_graph(num_rows) -> None:
    embeds, features = torch.ones(num_rows, 2, requires_grad=True), torch.ones(0, 2, requires_grad=True)
    out = merge_embeddings(embeds, features, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(out, embeds)
    assert out.data_ptr() != embeds.data_ptr() or not num_rows
    out.sum().backward()
    assert embeds.grad.shape == embeds.shape
    assert features.grad.shape == (0, 2)


Z = torch.zeros


@pytest.mark.parametrize(
    ("embeds", "features", "positions", "words"),
    [
        (Z(5, 8), Z(2, 7), Z(2).long(), ["(5, 8)", "(2, 7)"]),
        (Z(1, 5, 8), Z(2, 8), Z(2).long(), ["(1, 5, 8)", "flatten"]),
        (Z(5, 8), Z(2, 8).half(), Z(2).long(), ["float32", "float16", "cast"]),
        (Z(5, 8), Z(2, 8), Z(3).long(), ["(2,)", "(3,)"]),
        (Z(5, 8), Z(2, 8), Z(2), ["int32 or int64", "float32"]),
        (Z(5, 8), Z(2, 8), torch.tensor([0, 5]), ["below the 5 rows", "got 5"]),
        (Z(0, 8), Z(1, 8), torch.tensor([0]), ["below the 0 rows", "got 0"]),
        (Z(5, 8), Z(3, 8), torch.tensor([3, 1, 3]), ["distinct", "got 3"]),
        (Z(5, 8), Z(4, 8), torch.tensor([2, -1, -1, 2]), ["distinct", "got 2"]),
    ],
)
def test_refuses_operands_that_do_not_fit(embeds, features, positions, words) -> None:
    with pytest.raises(ValueError, match="merge_embeddings: expected") as caught:
        merge_embeddings(embeds, features, positions)
    assert all(word in str(caught.value) for word in words), caught.value
