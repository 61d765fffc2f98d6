"""Audio bytes to 16-bit mono at the model's rate. Log-mel happens on the model's device."""

from __future__ import annotations

import io

import numpy as np

from trichord.samples.augment import fit_length, jitter_waveform, resample
from trichord.samples.config import AudioConfig
from trichord.samples.image import describe_fault
from trichord.shards.quarantine import BadSample

_FULL_SCALE = 32768.0
_MAX_CHANNELS = 64


def resampled_length(frames: int, rate: int, target_rate: int) -> int:
    """Samples at `target_rate` that a clip of `frames` at `rate` becomes: ceil(frames * target_rate / rate).

    Planning and decoding both ask here, so a planned length is always the decoded one.
    """
    return -(-frames * target_rate // rate)


def check_duration(frames: int, rate: int, config: AudioConfig) -> None:
    """Raises BadSample when a clip is empty or over the cap."""
    if frames <= 0 or rate <= 0:
        raise BadSample(f"the audio has {frames} frames at {rate} Hz; expected at least one")
    if frames > config.max_seconds * rate:
        raise BadSample(
            f"the audio is {frames / rate:.2f} s long; samples.audio.max_seconds allows {config.max_seconds:g}"
        )


def decode_audio(
    data: bytes,
    config: AudioConfig,
    indexed: tuple[int, int] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Decode, mix to mono, resample: int16 (n,) with n = `resampled_length(frames, rate, config.sample_rate)`.

    Args:
        indexed: (frames, rate) as the sidecar has them; other ones are a content fault, since n was planned from them.
        rng: draws the augmentation; None for evaluation.

    Raises:
        BadSample: no audio that libsndfile reads, cut short, over `max_seconds`, not finite, or not of indexed length.
    """
    samples, rate = _read(data, config, indexed)
    length = resampled_length(len(samples), rate, config.sample_rate)
    if samples.dtype == np.int16 and samples.shape[1] == 1 and rate == config.sample_rate and rng is None:
        return np.ascontiguousarray(samples[:, 0])
    waveform = samples.mean(axis=1, dtype=np.float32)
    if samples.dtype == np.float32:
        waveform = waveform * np.float32(_FULL_SCALE)
    waveform = fit_length(resample(waveform, config.sample_rate, rate), length)
    if rng is not None:
        waveform = jitter_waveform(waveform, config, rng)
    return np.rint(waveform).clip(-_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def _read(data: bytes, config: AudioConfig, indexed: tuple[int, int] | None) -> tuple[np.ndarray, int]:
    """Samples (frames, channels), int16 or float32 in [-1, 1], and their rate; never more than the caps allow."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if file.channels > _MAX_CHANNELS:
                raise BadSample(f"the audio has {file.channels} channels; at most {_MAX_CHANNELS} are mixed to mono")
            if indexed is not None and indexed[1] != rate:
                raise BadSample(f"the audio is sampled at {rate} Hz, its index says {indexed[1]}")
            # Asked for integers, libsndfile neither scales float files nor clips its lossy decoders' overshoot.
            dtype = "int16" if file.subtype == "PCM_16" else "float32"
            limit = (indexed[0] if indexed else int(config.max_seconds * rate)) + 1
            samples = file.read(frames=limit, dtype=dtype, always_2d=True)
    except (BadSample, MemoryError, ImportError):
        raise
    except Exception as error:  # the bytes are in memory: whatever the decoder says is about them
        raise BadSample(f"the audio cannot be decoded: {describe_fault(error)}") from error
    if indexed is not None and len(samples) != indexed[0]:
        found = "more" if len(samples) > indexed[0] else len(samples)  # only one frame more was asked for
        raise BadSample(f"length differs from index: the index says {indexed[0]} frames, the decoder gave {found}")
    check_duration(len(samples), rate, config)
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        raise BadSample("the audio holds values that are not finite")
    return samples, rate
