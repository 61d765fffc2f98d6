"""log_mel: Whisper's numbers, and nothing of a clip's padding or neighbours in its features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import WhisperFeatureExtractor

from trichord_kernels import log_mel, mel, num_mel_frames

CLIP_SAMPLES = 480_000  # Whisper's 30 s


@pytest.fixture(scope="module")
def clip() -> torch.Tensor:
    """30 s of noise growing from silence, with a tone: exercises the floor of 8 below the maximum."""
    seconds = torch.arange(CLIP_SAMPLES) / 16000
    noise = torch.randn(CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    return noise * 0.1 * (seconds / 30) ** 4 + 0.2 * torch.sin(2 * torch.pi * 440 * seconds) * (seconds > 20)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_equals_whisper_on_a_full_clip(clip, n_mels) -> None:
    want = WhisperFeatureExtractor(feature_size=n_mels)(clip.numpy(), sampling_rate=16000)["input_features"][0]
    got = log_mel(clip[None], [CLIP_SAMPLES], n_mels=n_mels)
    assert got.shape == (1, n_mels, 3000)
    error = np.abs(got[0].numpy() - want).max()
    assert error < 2e-5, error  # measured 2.4e-7 on noise, 5e-6 in the quietest bins here; values span 2


def test_equals_whisper_on_a_padded_clip_until_its_own_end(clip) -> None:
    """Whisper pads with silence before its frames; only the last frames, which straddle the end, may differ."""
    piece = clip[-50_000:]
    want = WhisperFeatureExtractor()(piece.numpy(), sampling_rate=16000)["input_features"][0]
    got = log_mel(piece[None], [50_000])
    assert got.shape[-1] == 312
    np.testing.assert_allclose(got[0, :, :310].numpy(), want[:, :310], atol=2e-5)


@pytest.mark.parametrize("n_mels", [40, 80, 128])
def test_filterbank_equals_transformers(n_mels) -> None:
    want = WhisperFeatureExtractor(feature_size=n_mels).mel_filters.T
    np.testing.assert_allclose(mel.mel_filterbank(n_mels=n_mels).numpy(), want, atol=1e-7)


@pytest.mark.parametrize("slack", [float("nan"), 1e6])
@pytest.mark.parametrize("length", [1, 2, 159, 160, 199, 200, 201, 399, 401, 5000, 16_000])
def test_a_clip_does_not_feel_its_padding_or_neighbours(clip, length, slack) -> None:
    alone = clip[-length:]
    batch = torch.full((3, 16_000), slack) * torch.tensor([1.0, -1.0]).repeat(8000)
    batch[0] = clip[-16_000:]
    batch[1, :length] = alone
    got = log_mel(batch, [16_000, length, 0])
    frames = num_mel_frames(length)
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[1, :, :frames], log_mel(alone[None], [length])[0], atol=1e-6, rtol=0)
    assert not got[1, :, frames:].any()
    assert not got[2].any()


@pytest.mark.parametrize("length", [2, 3, 57, 200, 201, 1000])
def test_short_clips_reflect_as_numpy_does(clip, length) -> None:
    piece = clip[-length:]
    padded = mel._reflect_ends(torch.nn.functional.pad(piece, (0, 9))[None], torch.tensor([length]), 200)
    np.testing.assert_array_equal(padded[0, : length + 400].numpy(), np.pad(piece.numpy(), 200, mode="reflect"))


def test_floor_follows_the_clips_own_maximum(clip) -> None:
    loud, quiet = clip[-16_000:], clip[-16_000:] * 0.1
    got = log_mel(torch.stack([loud, quiet]), [16_000, 16_000])
    for feature in got:
        assert feature.max() - feature.min() <= 2.0 + 1e-6  # 8 decades / 4
    torch.testing.assert_close(got[0] - got[1], torch.full_like(got[0], 2 / 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("samples", "frames"), [(0, 0), (1, 1), (159, 1), (160, 1), (319, 1), (320, 2), (480_000, 3000)]
)
def test_num_mel_frames(samples, frames) -> None:
    assert num_mel_frames(samples) == frames
    assert log_mel(torch.zeros(1, max(samples, 1)), [samples]).shape == (1, 80, frames)


def test_autocast_does_not_lower_the_precision(clip) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = log_mel(clip[None, -16_000:], [16_000])
    assert got.dtype == torch.float32
    assert torch.equal(got, log_mel(clip[None, -16_000:], [16_000]))


def test_constants_made_under_fake_tensors_are_not_kept() -> None:
    mel._CONSTANTS.clear()
    with FakeTensorMode():
        assert log_mel(torch.empty(2, 3200), [1600, 3200]).shape == (2, 80, 20)
    assert torch.isfinite(log_mel(torch.zeros(2, 3200), [1600, 3200])).all()


@pytest.mark.parametrize(
    ("waveforms", "lengths", "words"),
    [
        (torch.zeros(2, 10), [10], ["2 lengths", "[10]"]),
        (torch.zeros(1, 10), [11], ["between 0 and 10", "[11]"]),
        (torch.zeros(1, 10, dtype=torch.int16), [10], ["float32", "int16", "32768"]),
        (torch.zeros(10), [10], ["(B, N)", "(10,)"]),
    ],
)
def test_refuses_what_does_not_fit(waveforms, lengths, words) -> None:
    with pytest.raises(ValueError, match="log_mel: expected") as caught:
        log_mel(waveforms, lengths)
    assert all(word in str(caught.value) for word in words), caught.value
