"""Audio bytes to 16-bit mono at the model's rate. Log-mel happens on the model's device, or in encoders/log_mel.py.

Plain WAV is read by samples/wav.py, plain FLAC by samples/flac.py, everything else by libsndfile.
Why: docs/decisions/image-and-audio-decoders.md.
"""

from __future__ import annotations

import numpy as np

from trichord.core.errors import TrichordError
from trichord.samples.augment import fit_length, jitter_waveform, resample
from trichord.samples.config import AudioConfig
from trichord.samples.flac import decode_flac, read_flac_header
from trichord.samples.image import describe_fault
from trichord.samples.member import MemberReader
from trichord.samples.sound_file import read_sound_file
from trichord.samples.wav import read_wav_frames, read_wav_header
from trichord.shards.quarantine import BadSample

_FULL_SCALE = 32768.0
_MAX_CHANNELS = 64
_RATES = (100, 1_000_000)
"""In Hz. Beyond these a header lies, and the resampler's filter would grow with the ratio of the rates."""
_HEADER_BYTES = 64


def clip_samples(frames: int, rate: int, config: AudioConfig) -> int:
    """Samples at the model's rate that `decode_audio` gives for a clip of `frames` at `rate`.

    ceil(frames * sample_rate / rate), with the crop's frames where a long clip is cropped. Planning and decoding both
    ask here, so a planned length is always the decoded one.

    Raises:
        BadSample: empty, no rate of audio, or longer than `max_seconds` where long clips are dropped.
    """
    return _output_length(_used_frames(frames, rate, config), rate, config)


def is_cropped(frames: int, rate: int, config: AudioConfig) -> bool:
    """Whether a clip is longer than it may be. Then it is worth a `MemberReader`; a whole one is best read at once."""
    return frames > config.max_seconds * rate


def decode_audio(
    source: bytes | MemberReader,
    config: AudioConfig,
    indexed: tuple[int, int] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Decode, crop, mix to mono, resample: int16 (n,) with n = `clip_samples(frames, rate, config)`.

    Args:
        source: the member; of a clip to be cropped, a reader of WAV or FLAC is asked for little more than the crop.
        indexed: (frames, rate) as the sidecar has them; other ones are a content fault, since n was planned from them.
        rng: draws the crop, then the augmentation; None (evaluation) takes the clip's beginning.

    Raises:
        BadSample: no audio that is known here, cut short, over `max_seconds`, not finite, or not of indexed length.
        DataError: from `source.read`; the storage failed.
    """
    member = source if isinstance(source, MemberReader) else MemberReader.of(source)
    try:
        samples, rate = _read(member, config, indexed, rng)
    except (BadSample, TrichordError, MemoryError, ImportError):
        raise
    except Exception as error:  # storage faults are TrichordErrors: whatever a decoder says is about the bytes
        raise BadSample(f"the audio cannot be decoded: {describe_fault(error)}") from error
    if samples.dtype == np.float32 and not np.isfinite(samples).all():
        raise BadSample("the audio holds values that are not finite")
    return _to_mono_int16(samples, rate, config, rng)


def _to_mono_int16(samples: np.ndarray, rate: int, config: AudioConfig, rng: np.random.Generator | None) -> np.ndarray:
    """(frames, channels) int16, or float32 in [-1, 1], to the waveform."""
    length = _output_length(len(samples), rate, config)
    jittered = rng is not None and config.jitters
    if samples.dtype == np.int16 and samples.shape[1] == 1 and rate == config.sample_rate and not jittered:
        return np.ascontiguousarray(samples[:length, 0])
    waveform = samples[:, 0].astype(np.float32) if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if samples.dtype == np.float32:
        waveform = waveform * np.float32(_FULL_SCALE)
    waveform = fit_length(resample(waveform, rate, config.sample_rate), length)
    if rng is not None:
        waveform = jitter_waveform(waveform, config, rng)
    return np.rint(waveform).clip(-_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16)


def _used_frames(frames: int, rate: int, config: AudioConfig) -> int:
    if frames <= 0 or rate <= 0:
        raise BadSample(f"the audio has {frames} frames at {rate} Hz; expected at least one")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise BadSample(f"the audio is sampled at {rate} Hz; expected {_RATES[0]} to {_RATES[1]}")
    if not is_cropped(frames, rate, config):
        return frames
    if config.long_clips == "crop":
        return max(1, int(config.max_seconds * rate))
    raise BadSample(f"the audio is {frames / rate:.2f} s long; samples.audio.max_seconds allows {config.max_seconds:g}")


def _output_length(frames: int, rate: int, config: AudioConfig) -> int:
    most = max(1, int(config.max_seconds * config.sample_rate))  # what the audio tower has positions for
    return min(-(-frames * config.sample_rate // rate), most)


def _read(
    member: MemberReader, config: AudioConfig, indexed: tuple[int, int] | None, rng: np.random.Generator | None
) -> tuple[np.ndarray, int]:
    """The used frames, int16 or float32 (frames, channels), and their rate; never more than the caps allow."""

    def choose(frames: int, rate: int, channels: int) -> tuple[int, int]:
        """Judge a header; first frame and number of frames to decode."""
        if channels > _MAX_CHANNELS:
            raise BadSample(f"the audio has {channels} channels; at most {_MAX_CHANNELS} are mixed to mono")
        if indexed is not None and indexed[1] != rate:
            raise BadSample(f"the audio is sampled at {rate} Hz, its index says {indexed[1]}")
        if indexed is not None and indexed[0] != frames:
            raise BadSample(f"length differs from index: the index says {indexed[0]} frames, the decoder gave {frames}")
        used = _used_frames(frames, rate, config)
        cropped = used < frames and rng is not None
        return (int(rng.integers(0, frames - used + 1)) if cropped else 0), used

    head = member.read(0, _HEADER_BYTES)
    if head[:4] == b"RIFF":
        wav = read_wav_header(member.read, member.size)
        if wav is not None:
            start, count = choose(wav.frames, wav.rate, wav.channels)
            return read_wav_frames(member.read, wav, start, count), wav.rate
    flac = read_flac_header(head)
    if flac is not None and flac.frames:
        start, count = choose(flac.frames, flac.rate, flac.channels)
        samples = decode_flac(member.read(0, member.size), flac) if count == flac.frames else None
        if samples is not None:
            return samples, flac.rate
        return read_sound_file(member, lambda *header: (start, count), flac.frames, crop=count < flac.frames)
    crop = indexed is not None and is_cropped(*indexed, config)
    return read_sound_file(member, choose, indexed[0] if indexed else None, crop)
