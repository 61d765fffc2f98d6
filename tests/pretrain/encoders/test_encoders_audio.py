"""Audio towers: a clip's features depend on the clip alone, and there are as many as planned."""

from __future__ import annotations

import pytest
import torch

from trichord.core.errors import ConfigError
from trichord.encoders.audio import AudioTower
from trichord.encoders.config import AudioEncoderConfig, MelConfig
from trichord.encoders.lengths import audio_tokens, mel_frames
from trichord.encoders.padding import flatten_items
from trichord.samples.config import AudioConfig
from trichord_kernels import num_mel_frames

LENGTHS = [4000, 161, 1600, 2399, 1, 16000]


def build_tower(kind: str, stride: int) -> AudioTower:
    torch.manual_seed(0)
    leaf = AudioEncoderConfig(
        kind=kind, hidden_size=32, num_layers=2, num_heads=2, stride=stride, mel=MelConfig(n_mels=20)
    )
    return AudioTower(leaf, AudioConfig(max_seconds=1.0)).eval()


def clips() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, generator=generator) * 5000).to(torch.int16) for n in LENGTHS]


KINDS = [("mel_transformer", 1), ("mel_transformer", 2), ("mel_transformer", 5), ("whisper", 2)]


@pytest.mark.parametrize(("kind", "stride"), KINDS)
@torch.no_grad()
def test_padding_never_changes_a_clip(kind, stride):
    """Measured worst difference 8.3e-7 of features of size 2."""
    tower = build_tower(kind, stride)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    together = tower(torch.cat(clips()), offsets)
    counts = tower.count_tokens(offsets)
    for number, clip in enumerate(clips()):
        alone = tower(clip, [0, len(clip)])
        assert alone.shape == (1, counts[number], 32)
        assert counts[number] == audio_tokens(tower.config, len(clip))
        torch.testing.assert_close(together[number, : counts[number]], alone[0], rtol=0, atol=5e-6)
    assert flatten_items(together, counts).shape == (sum(counts), 32)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("num_samples", [1, 159, 160, 161, 320, 321, 16000, 479_999])
def test_planned_frames_are_those_of_the_front_end(num_samples):
    leaf = AudioEncoderConfig()
    assert mel_frames(leaf, num_samples) == num_mel_frames(num_samples, 160)


def test_an_empty_clip_is_refused():
    with pytest.raises(ConfigError, match="at least one sample, got 0"):
        audio_tokens(AudioEncoderConfig(), 0)


def test_every_mel_frame_is_read():
    """The last frames of a clip change some token, whatever the stride."""
    for stride in (1, 2, 3, 5, 8):
        tower = build_tower("mel_transformer", stride)
        features = torch.randn(1, 20, 13, requires_grad=True)
        tokens = -(-13 // stride)
        tower.encoder(features, [13], [tokens]).square().sum().backward()
        assert (features.grad.abs().sum(1) > 0).all()


def test_clips_longer_than_whispers_positions_are_refused():
    leaf = AudioEncoderConfig(kind="whisper", hidden_size=32, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="allows 3100 mel frames, but Whisper has positions for 3000"):
        AudioTower(leaf, AudioConfig(max_seconds=31.0))


def test_constants_survive_a_bf16_cast():
    tower = build_tower("mel_transformer", 2)
    before = tower.encoder.positions.on(torch.device("cpu")).clone()
    assert torch.equal(tower.bfloat16().encoder.positions.on(torch.device("cpu")), before)
    assert tower(clips()[0], [0, 4000]).dtype == torch.bfloat16
