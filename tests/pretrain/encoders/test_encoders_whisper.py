"""Whisper encoders that start from a released checkpoint folder."""

from __future__ import annotations

import pytest
import torch
from transformers import WhisperConfig, WhisperModel

from trichord.core.errors import ConfigError
from trichord.encoders.audio import AudioTower
from trichord.encoders.config import AudioEncoderConfig, MelConfig
from trichord.samples.config import AudioConfig

SIZES = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128, "num_mel_bins": 20}


@pytest.fixture
def released(tmp_path):
    torch.manual_seed(0)
    config = WhisperConfig(**SIZES, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=60)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = config.decoder_start_token_id = 0
    WhisperModel(config).save_pretrained(tmp_path)
    return tmp_path


def leaf(path, **changes) -> AudioEncoderConfig:
    fields = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mel": MelConfig(n_mels=20), **changes}
    return AudioEncoderConfig(kind="whisper", weights=str(path), **fields)


def test_weights_are_the_released_encoder_and_nothing_of_the_decoder(released):
    tower = AudioTower(leaf(released), AudioConfig(max_seconds=2))
    theirs = WhisperModel.from_pretrained(released).encoder.state_dict()
    own = tower.encoder.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert not tower.encoder.embed_positions.weight.requires_grad


def test_other_sizes_are_named(released):
    with pytest.raises(ConfigError, match=r"d_model is 32 there and 64 here, encoder_layers is 2 there and 3 here"):
        AudioTower(leaf(released, hidden_size=64, num_layers=3), AudioConfig(max_seconds=2))


def test_shapes_that_the_leaf_cannot_say_are_refused(released):
    """The leaf alone has to give the same encoder again, in an export."""
    config = WhisperConfig.from_pretrained(released)
    config.encoder_ffn_dim = 96
    config.save_pretrained(released)
    with pytest.raises(ConfigError, match="encoder_ffn_dim is 96 there and 128 here"):
        AudioTower(leaf(released), AudioConfig(max_seconds=2))


def test_no_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json in"):
        AudioTower(leaf(tmp_path / "nothing"), AudioConfig(max_seconds=2))


def test_dropout_is_off(released):
    config = WhisperConfig.from_pretrained(released)
    config.dropout = config.encoder_layerdrop = 0.5
    config.save_pretrained(released)
    tower = AudioTower(leaf(released), AudioConfig(max_seconds=2)).train()
    clip = torch.full((3200,), 100, dtype=torch.int16)
    assert torch.equal(tower(clip, [0, 3200]), tower(clip, [0, 3200]))
