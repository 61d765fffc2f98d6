"""Plain WAV: every layout its writers leave, and nothing read beyond what is wanted."""

import io
import struct

import numpy as np
import pytest
import soundfile

import trichord.samples.audio as audio_module
from trichord.samples.audio import decode_audio
from trichord.samples.config import AudioConfig
from trichord.samples.member import MemberReader
from trichord.samples.wav import read_wav_header
from trichord.shards.quarantine import BadSample

CONFIG = AudioConfig(sample_rate=16_000, max_seconds=2.0)
SAMPLES = np.random.default_rng(0).integers(-20_000, 20_000, 8000).astype("<i2")
PCM = SAMPLES.tobytes()
PCM_GUID = bytes.fromhex("0100000000001000800000aa00389b71")


def form(channels=1, rate=16_000, tag=1, bits=16, align=None, extension=b"") -> bytes:
    align = channels * bits // 8 if align is None else align
    return struct.pack("<HHIIHH", tag, channels, rate, rate * align % 2**32, align, bits) + extension


def chunk(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + struct.pack("<I", len(body) if size is None else size) + body + b"\0" * (len(body) % 2)


def wav(data=PCM, size=None, fmt=None, before=b"", after=b"") -> bytes:
    body = b"WAVE" + chunk(b"fmt ", form() if fmt is None else fmt) + before + chunk(b"data", data, size) + after
    return chunk(b"RIFF", body)


EXTENSIBLE = struct.pack("<HHI", 22, 16, 4) + PCM_GUID
LAYOUTS = {
    "plain": wav(),
    "extensible": wav(fmt=form(tag=0xFFFE, extension=EXTENSIBLE)),
    "format of 18 bytes": wav(fmt=form(extension=b"\0\0")),
    "odd chunk before": wav(before=chunk(b"LIST", b"abc")),
    "large chunk before": wav(before=chunk(b"junk", bytes(70_001))),
    "many chunks before": wav(before=chunk(b"note", b"x" * 20) * 100),
    "chunk behind": wav(after=chunk(b"LIST", b"INFOabcd")),
    "size unknown, 0": wav(size=0),
    "size unknown, -1": wav(size=0xFFFFFFFF),
    "half a frame at the end": wav(SAMPLES.tobytes() + b"\1", 16_001),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_without_libsndfile(name, monkeypatch):
    monkeypatch.setattr(audio_module, "read_sound_file", lambda *args: pytest.fail("libsndfile was asked"))
    assert (decode_audio(LAYOUTS[name], CONFIG, (8000, 16_000)) == SAMPLES).all()


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(channels):
    data = np.stack([SAMPLES] + [np.zeros_like(SAMPLES)] * (channels - 1), axis=1).tobytes()
    wave = decode_audio(wav(data, fmt=form(channels)), CONFIG, (8000, 16_000))
    assert np.abs(wave - SAMPLES / channels).max() <= 0.51


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (wav()[:-2], "cut short: 15998 of 16000 bytes"),
        (wav(size=20_000), "cut short: 16000 of 20000 bytes"),
        (wav()[:44], "cut short: 0 of 16000 bytes"),
        (wav()[:30], "format chunk of 10 bytes|without samples"),
        (wav(b""), "0 frames"),
        (wav(fmt=form(rate=0)), "at 0 Hz"),
        (wav(fmt=form(rate=99)), "99 Hz; expected 100"),
        (wav(fmt=form(rate=2**31)), "Hz; expected 100"),
        (wav(fmt=form(channels=0)), "0 channels"),
        (wav(fmt=form(channels=65)), "65 channels; at most 64"),
        (wav(fmt=form(align=4)), "4 bytes a frame"),
        (chunk(b"RIFF", b"WAVE" + chunk(b"data", SAMPLES.tobytes()) + chunk(b"fmt ", form())), "before their format"),
        (chunk(b"RIFF", b"WAVE" + chunk(b"note", b"x") * 300 + chunk(b"data", b"")), "without samples"),
        (chunk(b"RIFF", b"WAVE" + struct.pack("<4sI", b"note", 2**32 - 1)), "without samples"),
    ],
)
def test_damaged_and_senseless_files_are_refused(data, message):
    with pytest.raises(BadSample, match=message):
        decode_audio(data, CONFIG)


def test_every_cut_is_refused_or_harmless():
    data = wav(SAMPLES[:50].tobytes(), before=chunk(b"LIST", b"abc"))
    for end in range(len(data)):
        with pytest.raises(BadSample):
            decode_audio(data[:end], CONFIG, (50, 16_000))


@pytest.mark.parametrize("container", ["RF64", "W64", "AIFF"])
def test_other_containers_of_the_same_samples_go_to_libsndfile(container):
    buffer = io.BytesIO()
    soundfile.write(buffer, SAMPLES, 16_000, format=container, subtype="PCM_16")
    assert (decode_audio(buffer.getvalue(), CONFIG, (8000, 16_000)) == SAMPLES).all()


def test_other_encodings_are_left_to_libsndfile():
    for fmt in (form(bits=24), form(tag=3, bits=32), form(tag=0xFFFE, bits=24, extension=EXTENSIBLE), form(bits=8)):
        data = wav(fmt=fmt)
        assert read_wav_header(lambda at, size, data=data: data[at : at + size], len(data)) is None


class CountedReader:
    """A member that says how much of it was read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read_bytes = data, 0

    def member(self) -> MemberReader:
        return MemberReader(len(self.data), self._read)

    def _read(self, offset: int, size: int) -> bytes:
        part = self.data[offset : offset + size]
        self.read_bytes += len(part)
        return part


def test_of_a_long_clip_only_the_crop_is_read():
    frames = 16_000 * 300
    samples = (np.arange(frames) % 30_000).astype("<i2")
    config = AudioConfig(max_seconds=2.0, long_clips="crop")
    for seed in (None, 1, 2):
        reader = CountedReader(wav(samples.tobytes(), before=chunk(b"junk", bytes(9001))))
        rng = None if seed is None else np.random.default_rng(seed)
        wave = decode_audio(reader.member(), config, (frames, 16_000), rng)
        assert len(wave) == 32_000
        assert reader.read_bytes < 64_000 + 5000
        start = 0 if seed is None else int(np.random.default_rng(seed).integers(0, frames - 32_000 + 1))
        assert (wave == samples[start : start + 32_000]).all()
