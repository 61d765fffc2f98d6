"""Log-mel of the workers is that of the device, clip by clip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from trichord.encoders.audio import AudioTower
from trichord.encoders.config import AudioEncoderConfig, MelConfig
from trichord.encoders.lengths import audio_tokens, mel_frames
from trichord.encoders.log_mel import clip_log_mel
from trichord.samples.config import AudioConfig

LENGTHS = [1, 2, 159, 160, 161, 399, 401, 4000, 15_999, 16_000]


def clip(length: int, kind: str = "speech") -> np.ndarray:
    rng = np.random.default_rng(length)
    time = np.arange(length) / 16_000
    if kind == "silence":
        return np.zeros(length, dtype=np.int16)
    if kind == "loud noise":
        return rng.integers(-32_768, 32_768, length).astype(np.int16)
    voiced = np.sin(2 * np.pi * 150 * time) + 0.4 * np.sin(2 * np.pi * 1230 * time)
    return (4000 * voiced * np.abs(np.sin(7 * time)) + 60 * rng.standard_normal(length)).astype(np.int16)


def tower(kind: str = "mel_transformer", stride: int = 2, **mel: int) -> AudioTower:
    torch.manual_seed(0)
    leaf = AudioEncoderConfig(
        kind=kind, hidden_size=32, num_layers=2, num_heads=2, stride=stride, mel=MelConfig(**{"n_mels": 20} | mel)
    )
    return AudioTower(leaf, AudioConfig(max_seconds=1.0)).eval()


@pytest.mark.parametrize("kind", ["speech", "silence", "loud noise"])
@pytest.mark.parametrize(
    "mel", [{}, {"n_mels": 80}, {"n_fft": 512, "hop_length": 128}, {"n_fft": 64, "hop_length": 160}]
)
@torch.no_grad()
def test_it_is_what_the_device_computes(kind, mel):
    """Measured worst difference 4.8e-7."""
    audio = tower(**mel)
    make = clip_log_mel(audio.config, 16_000)
    clips = [clip(length, kind) for length in LENGTHS]
    on_device = audio._log_mel(torch.from_numpy(np.concatenate(clips)), LENGTHS)
    for number, waveform in enumerate(clips):
        ours = make(waveform)
        assert ours.dtype == np.float32
        assert ours.shape == (mel_frames(audio.config, len(waveform)), audio.config.mel.n_mels)
        theirs = on_device[number, :, : len(ours)].T.numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "stride"), [("mel_transformer", 1), ("mel_transformer", 5), ("whisper", 2)])
@torch.no_grad()
def test_the_tower_gives_the_same_features_from_either(kind, stride):
    audio = tower(kind, stride)
    make = clip_log_mel(audio.config, 16_000)
    clips = [clip(length) for length in LENGTHS]
    offsets = [0, *itertools.accumulate(LENGTHS)]
    log_mels = [make(waveform) for waveform in clips]
    mel_offsets = [0, *itertools.accumulate(len(mel) for mel in log_mels)]
    from_waveforms = audio(torch.from_numpy(np.concatenate(clips)), offsets)
    none = torch.zeros(0, dtype=torch.int16)
    from_mels = audio(none, offsets, torch.from_numpy(np.concatenate(log_mels)), mel_offsets)
    counts = audio.count_mel_tokens(mel_offsets)
    assert counts == audio.count_tokens(offsets) == [audio_tokens(audio.config, length) for length in LENGTHS]
    for number, count in enumerate(counts):
        torch.testing.assert_close(from_mels[number, :count], from_waveforms[number, :count], rtol=0, atol=1e-5)


def test_a_clip_of_one_sample_is_reflected_as_one_value():
    assert np.isfinite(clip_log_mel(AudioEncoderConfig(), 16_000)(np.array([7], dtype=np.int16))).all()
