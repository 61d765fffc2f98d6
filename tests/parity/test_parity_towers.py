"""Our towers against the public models they are made of: same weights, same input."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from trichord.encoders.audio import AudioTower
from trichord.encoders.config import AudioEncoderConfig, MelConfig, VisionConfig
from trichord.encoders.vision import VisionTower
from trichord.samples.config import AudioConfig, ImageConfig


def test_whisper_equals_transformers_at_3000_frames():
    """Waveform to features, 30 s of noise. Measured worst 9.5e-7 (encoder), 1.1e-6 (with the log-mel) of size 3.7."""
    leaf = AudioEncoderConfig(kind="whisper", hidden_size=32, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    tower = AudioTower(leaf, AudioConfig()).eval()
    config = WhisperConfig(
        d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128, attn_implementation="eager"
    )
    theirs = WhisperEncoder(config).eval()
    theirs.load_state_dict(tower.encoder.state_dict())
    generator = torch.Generator().manual_seed(0)
    waveform = (torch.randn(480_000, generator=generator) * 3000).to(torch.int16)
    features = WhisperFeatureExtractor()(waveform.numpy() / 32768.0, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(features["input_features"]).last_hidden_state
        in_between = tower.encoder(features["input_features"], [3000], [1500])
        ours = tower(waveform, [0, 480_000])
    torch.testing.assert_close(in_between, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_vision_tower_equals_timm_patch_tokens(name):
    """Normalised pixels to patch tokens, bit for bit; only the pooling that we do not use may be missing."""
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    image = ImageConfig(size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(name=name, options=options), image).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=32, **options).eval()
    missing = theirs.load_state_dict(tower.backbone.state_dict(), strict=False)
    assert all(key.startswith("attn_pool.") for key in missing.missing_keys)
    assert not missing.unexpected_keys
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (image.mean, image.std))
    with torch.no_grad():
        expected = theirs.forward_features((pixels / 255.0 - mean) / std)[:, theirs.num_prefix_tokens :]
        ours = tower(pixels)
    assert torch.equal(ours, expected)
    assert ours.shape == (2, tower.tokens_per_image, 32)


def test_whisper_log_mel_options_reach_the_front_end():
    leaf = AudioEncoderConfig(
        kind="whisper", hidden_size=32, num_layers=1, num_heads=2, mel=MelConfig(n_mels=128, hop_length=160)
    )
    tower = AudioTower(leaf, AudioConfig(max_seconds=5)).eval()
    assert tower.encoder.conv1.in_channels == 128
    assert tower(torch.zeros(1600, dtype=torch.int16), [0, 1600]).shape == (1, 5, 32)
