"""Text towers: segments are read from the stream by host lengths, alone."""

from __future__ import annotations

import pytest
import torch

from trichord.encoders.config import TextEncoderConfig
from trichord.encoders.text import TextTower


def build_tower(kind: str, max_tokens: int = 8) -> TextTower:
    torch.manual_seed(0)
    leaf = TextEncoderConfig(kind=kind, hidden_size=16, num_layers=2, num_heads=2, max_tokens=max_tokens)
    return TextTower(leaf, 40).eval()


IDS = torch.arange(3, 33)


@pytest.mark.parametrize("kind", ["mean", "transformer"])
@torch.no_grad()
def test_a_segment_is_read_alone(kind):
    """Also the last one, whose padded window would run past the stream's end. Measured worst 6.4e-7 of size 1.8."""
    tower = build_tower(kind)
    starts, lengths = torch.tensor([2, 9, 28, 0], dtype=torch.int32), [5, 1, 2, 0]
    together = tower(IDS, starts, lengths)
    assert together.dtype == torch.float32
    assert torch.isfinite(together).all()
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths)):
        if length:
            alone = tower(IDS[start : start + length].clone(), torch.zeros(1), [length])
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=3e-6)


@torch.no_grad()
def test_the_mean_is_the_mean():
    tower = build_tower("mean")
    got = tower(IDS, torch.tensor([4]), [3])[0]
    torch.testing.assert_close(got, tower.embedding.weight[IDS[4:7]].mean(0))


@torch.no_grad()
def test_the_transformer_knows_order_and_reads_up_to_max_tokens():
    tower = build_tower("transformer", max_tokens=4)
    forward = tower(torch.tensor([5, 6, 7, 8]), torch.zeros(1), [4])
    backward = tower(torch.tensor([8, 7, 6, 5]), torch.zeros(1), [4])
    longer = tower(torch.tensor([5, 6, 7, 8, 9, 9]), torch.zeros(1), [6])
    assert not torch.allclose(forward, backward)
    assert torch.equal(forward, longer)


def test_only_segments_without_text_runs_and_is_finite():
    tower = build_tower("transformer")
    out = tower(IDS, torch.zeros(3, dtype=torch.int32), [0, 0, 0])
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters())
