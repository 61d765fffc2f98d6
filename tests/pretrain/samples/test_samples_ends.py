"""Clips that are cut: Ogg and MP3 decode as far as they go, so their containers are asked whether that is all."""

import io

import numpy as np
import pytest
import soundfile

from trichord.samples.audio import decode_audio
from trichord.samples.config import AudioConfig
from trichord.samples.member import MemberReader
from trichord.shards.probes import measure
from trichord.shards.quarantine import BadSample

RATE = 16_000
CASES = [
    *(("OGG", "VORBIS", rate) for rate in (16_000, 44_100, 48_000)),
    *(("OGG", "OPUS", rate) for rate in (16_000, 48_000)),
    *(("MP3", "MPEG_LAYER_III", rate) for rate in (16_000, 44_100, 48_000)),
]
CROP = AudioConfig(long_clips="crop", max_seconds=1)


def encode(container, subtype, seconds=4, channels=1, rate=RATE) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, (rate, channels))
    with soundfile.SoundFile(buffer, "w", rate, channels, subtype, format=container) as file:
        for _ in range(seconds):  # libvorbis dies of a minute at once
            file.write(noise)
    return buffer.getvalue()


def indexed(data) -> tuple[int, int]:
    """As the sidecar of a shard has it, which knows nothing but the cut file."""
    found = measure("audio", io.BytesIO(data), len(data))
    if isinstance(found, str):
        raise BadSample(f"the audio is cut: {found}")  # before its first page of sound
    assert isinstance(found, list)
    frames, rate = found
    return frames, rate


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("container", "subtype", "rate"), CASES)
def test_cut_clips_are_refused_and_whole_ones_are_not(container, subtype, channels, rate):
    data = encode(container, subtype, 3, channels, rate)
    assert len(decode_audio(data, AudioConfig(), indexed(data))) == 3 * RATE
    for share in (0.4, 0.7, 0.85):
        cut = data[: int(len(data) * share)]
        with pytest.raises(BadSample, match="the audio is cut"):
            decode_audio(cut, AudioConfig(), indexed(cut))


@pytest.mark.parametrize("tag", [b"", b"ID3\x04\x00\x00\x00\x00\x02\x00" + bytes(256)])
def test_an_mp3_is_known_behind_a_tag_too(tag):
    data = tag + encode("MP3", "MPEG_LAYER_III", 2)
    decode_audio(data, AudioConfig(), indexed(data))
    cut = data[: len(data) // 2]
    with pytest.raises(BadSample, match="the audio is cut"):
        decode_audio(cut, AudioConfig(), indexed(cut))


def test_an_mp3_without_a_header_is_decoded_as_far_as_it_goes():
    data = encode("MP3", "MPEG_LAYER_III", 2)
    plain = data.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))
    cut = plain[: len(plain) // 2]
    assert len(decode_audio(cut, AudioConfig(), indexed(cut))) > RATE // 2


def test_what_stands_behind_the_last_ogg_page_is_no_damage():
    data = encode("OGG", "VORBIS", 2) + b"TAG OggS as text" + bytes(125)
    assert len(decode_audio(data, AudioConfig(), indexed(data))) == 2 * RATE


def test_the_end_of_a_long_ogg_costs_some_blocks():
    data = encode("OGG", "VORBIS", 400)
    read = []

    def reader(offset, size):
        read.append(size)
        return data[offset : offset + size]

    decode_audio(MemberReader(len(data), reader), CROP, (400 * RATE, RATE))
    assert sum(read) < 500_000 < len(data) / 2
    cut = data[: len(data) * 3 // 4]
    with pytest.raises(BadSample, match="the audio is cut"):
        decode_audio(MemberReader(len(cut), lambda offset, size: cut[offset : offset + size]), CROP, indexed(cut))
