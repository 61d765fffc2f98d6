"""Audio of every container and layout becomes int16 mono of exactly the planned length."""

import io

import numpy as np
import pytest
import soundfile

from trichord.samples.audio import clip_samples, decode_audio
from trichord.samples.config import AudioConfig
from trichord.shards.quarantine import BadSample

CONFIG = AudioConfig(sample_rate=16_000, max_seconds=2.0)


def tone(frames=8000, rate=16_000, hz=440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(frames) / rate)).astype(np.float32)


def encode(samples, rate=16_000, container="WAV", subtype="PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1),
        ("WAV", "PCM_24", 1),
        ("WAV", "FLOAT", 1),
        ("WAV", "DOUBLE", 1),
        ("WAV", "PCM_U8", 260),
        ("FLAC", "PCM_16", 1),
        ("FLAC", "PCM_24", 1),
        ("OGG", "VORBIS", 3000),
        ("MP3", "MPEG_LAYER_III", 3000),
    ],
)
def test_formats_keep_length_and_amplitude(container, subtype, tolerance):
    data = encode(tone(), 16_000, container, subtype)
    frames = soundfile.SoundFile(io.BytesIO(data)).frames
    wave = decode_audio(data, CONFIG, (frames, 16_000))
    assert wave.dtype == np.int16
    assert wave.shape == (frames,)
    assert np.abs(wave[:8000].astype(int) - np.rint(tone() * 32768)).max() <= tolerance


def test_stereo_is_averaged():
    data = encode(np.stack([tone(), np.zeros(8000, np.float32)], axis=1))
    assert np.abs(decode_audio(data, CONFIG).astype(int) - np.rint(tone() * 16384)).max() <= 1


def test_full_scale_floats_are_clipped_not_wrapped():
    wave = decode_audio(encode(np.array([1.0, 2.0, -1.0, -3.0], np.float32), subtype="FLOAT"), CONFIG)
    assert wave.tolist() == [32767, 32767, -32768, -32768]


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 15_999])
@pytest.mark.parametrize("frames", [1, 7, 4001])
def test_resampling_gives_the_planned_length(rate, frames):
    data = encode(tone(frames, rate), rate)
    wave = decode_audio(data, CONFIG, (frames, rate))
    assert len(wave) == clip_samples(frames, rate, CONFIG) == -(-frames * 16_000 // rate)


def test_resampling_keeps_the_tone():
    wave = decode_audio(encode(tone(22_050, 44_100, 1000), 44_100), CONFIG)
    expected = tone(8000, 16_000, 1000) * 32768
    assert np.abs(wave[200:-200] - expected[200:-200]).max() < 100


@pytest.mark.parametrize(
    ("data", "config", "indexed", "message"),
    [
        (b"no audio", CONFIG, None, "cannot be decoded"),
        (b"", CONFIG, None, "cannot be decoded"),
        (encode(tone(0)), CONFIG, None, "0 frames"),
        (encode(tone()), AudioConfig(max_seconds=0.4), None, r"longer|s long; samples\.audio\.max_seconds allows 0\.4"),
        (encode(tone()), CONFIG, (7999, 16_000), "index says 7999 frames, the decoder gave 8000"),
        (encode(tone()), CONFIG, (8001, 16_000), "index says 8001 frames, the decoder gave 8000"),
        (encode(tone()), CONFIG, (8000, 8000), "16000 Hz, its index says 8000"),
        (encode(np.array([0, np.nan], np.float32), subtype="FLOAT"), CONFIG, None, "not finite"),
        (encode(tone(), container="FLAC")[:4000], CONFIG, (8000, 16_000), "cannot be decoded|length differs"),
    ],
)
def test_bad_audio_is_refused(data, config, indexed, message):
    with pytest.raises(BadSample, match=message):
        decode_audio(data, config, indexed)


def test_augmentation_keeps_the_length_and_follows_the_generator():
    config = AudioConfig(speed_frac=0.2, gain_db=6, noise_db=-30)
    data = encode(tone())
    draws = [decode_audio(data, config, rng=np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert all(len(draw) == 8000 for draw in draws)
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert (decode_audio(data, config) == decode_audio(data, CONFIG)).all()


def test_gain_stays_within_its_bound():
    config = AudioConfig(gain_db=6)
    peaks = [
        np.abs(decode_audio(encode(tone()), config, rng=np.random.default_rng(s)).astype(int)).max() for s in range(20)
    ]
    assert 16384 / 2 * 0.99 < min(peaks) < 14000
    assert 18000 < max(peaks) <= 32767


def test_noise_is_at_most_as_loud_as_configured_and_sometimes_next_to_nothing():
    def level_db(seed):
        wave = decode_audio(encode(tone()), AudioConfig(noise_db=-20), rng=np.random.default_rng(seed))
        noise = wave - tone() * 32768
        return 20 * np.log10(np.sqrt(np.mean(noise**2)) / (16384 / np.sqrt(2)))

    levels = [level_db(seed) for seed in range(40)]
    assert -23 < max(levels) < -19.5
    assert -61 < min(levels) < -55


def test_speed_changes_the_pitch():
    config = AudioConfig(speed_frac=0.5)

    def pitch(wave):
        return np.abs(np.fft.rfft(wave[:4000])).argmax() * 16_000 / 4000

    pitches = {pitch(decode_audio(encode(tone()), config, rng=np.random.default_rng(s))) for s in range(8)}
    assert len(pitches) > 3
    assert all(440 * 0.5 - 8 <= p <= 440 * 1.5 + 8 for p in pitches)
