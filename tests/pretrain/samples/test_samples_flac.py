"""FLAC by either decoder is the same, bit for bit, and damage is found by either."""

import io
import sys

import numpy as np
import pytest
import soundfile

import trichord.samples.audio as audio_module
from trichord.samples.audio import decode_audio
from trichord.samples.config import AudioConfig
from trichord.samples.flac import read_flac_header
from trichord.shards.quarantine import BadSample

CONFIG = AudioConfig(max_seconds=3.0)
SAMPLES = (np.random.default_rng(0).normal(size=(20_000, 2)) * 3000).astype(np.int16)


def encode(samples, rate=16_000, subtype="PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype=subtype)
    return buffer.getvalue()


MONO = encode(SAMPLES[:, 0])


@pytest.fixture(params=["fast", "libsndfile"])
def decoder(request, monkeypatch):
    """The fast decoder must be the one that is used, and machines without it must do as well."""
    if request.param == "libsndfile":
        monkeypatch.setitem(sys.modules, "miniaudio", None)
    else:
        pytest.importorskip("miniaudio")
        monkeypatch.setattr(audio_module, "read_sound_file", lambda *args, **kw: pytest.fail("libsndfile was asked"))
    return request.param


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_both_decoders_give_the_samples(decoder, rate):
    data = encode(SAMPLES, rate)
    expected = audio_module._to_mono_int16(SAMPLES, rate, CONFIG, None)
    assert (decode_audio(data, CONFIG, (20_000, rate)) == expected).all()


def test_mono_is_bit_exact(decoder):
    assert (decode_audio(MONO, CONFIG, (20_000, 16_000)) == SAMPLES[:, 0]).all()
    assert (decode_audio(MONO, CONFIG) == SAMPLES[:, 0]).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
def test_cut_files_are_refused(decoder, share):
    words = "FLAC damaged or cut short: [0-9]+ of 20000 frames" if decoder == "fast" else "cannot be decoded"
    with pytest.raises(BadSample, match=words):
        decode_audio(MONO[: int(len(MONO) * share)], CONFIG, (20_000, 16_000))


def test_noise_is_refused(decoder):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = bytearray(MONO)
        place = int(rng.integers(200, len(data) - 20))
        data[place : place + 8] = rng.bytes(8)
        with pytest.raises(BadSample, match="cannot be decoded"):
            decode_audio(bytes(data), CONFIG, (20_000, 16_000))


def test_a_header_that_promises_much_is_refused_before_anything_is_allocated(decoder):
    data = bytearray(MONO)
    data[21] |= 0x0F  # the upper 4 of the 36 bits of the length
    assert read_flac_header(bytes(data)).frames > 2**35
    with pytest.raises(BadSample, match="s long"):
        decode_audio(bytes(data), CONFIG)
    with pytest.raises(BadSample, match="index says 20000"):
        decode_audio(bytes(data), CONFIG, (20_000, 16_000))


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 192_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_the_header_is_read_right(rate, channels, subtype):
    header = read_flac_header(encode(np.zeros((100, channels), np.int16), rate, subtype))
    assert header == (100, rate, channels, int(subtype[-2:]))


def test_a_stream_of_unknown_length_is_refused_since_no_decoder_is_bounded_on_it():
    data = bytearray(MONO)
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert read_flac_header(bytes(data)).frames == 0
    for indexed in (None, (20_000, 16_000)):
        with pytest.raises(BadSample):
            decode_audio(bytes(data), CONFIG, indexed)
