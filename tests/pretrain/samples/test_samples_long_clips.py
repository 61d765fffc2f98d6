"""Clips longer than allowed: dropped or cropped, with the length that planning was told; storage faults stay such."""

import io
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pytest
import soundfile

from trichord.core.errors import DataError
from trichord.samples.audio import clip_samples, decode_audio
from trichord.samples.config import AudioConfig, SamplesConfig
from trichord.samples.interleaved import Item
from trichord.samples.member import MemberReader
from trichord.samples.sample import decode_item
from trichord.shards import reader
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample
from trichord.shards.storage import read_range

CROP = AudioConfig(sample_rate=16_000, max_seconds=1.5, long_clips="crop")
DROP = AudioConfig(sample_rate=16_000, max_seconds=1.5)


def speechlike(frames, channels=1, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    knots = np.arange(0, frames + 1600, 1600)
    envelope = np.interp(np.arange(frames), knots, rng.random(len(knots)))
    samples = rng.standard_normal((frames, channels)) * envelope[:, None] * 0.1
    return (samples * 32768).clip(-32768, 32767).astype(np.int16)


def encode(samples, rate=16_000, container="FLAC", subtype="PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("frames", "rate", "expected"),
    [
        (16_000, 16_000, 16_000),
        (24_000, 16_000, 24_000),
        (24_001, 16_000, 24_000),
        (10**9, 44_100, 24_000),
        (1, 8000, 2),
    ],
)
def test_planned_length_of_a_clip(frames, rate, expected):
    assert clip_samples(frames, rate, CROP) == expected


@pytest.mark.parametrize(
    ("frames", "rate", "message"),
    [(24_001, 16_000, "1.50 s long; samples.audio.max_seconds allows 1.5"), (0, 16_000, "0 frames"), (5, 0, "0 Hz")],
)
def test_clips_that_cannot_be_used(frames, rate, message):
    with pytest.raises(BadSample, match=message):
        clip_samples(frames, rate, DROP)


def test_no_clip_is_longer_than_the_tower_has_positions_for():
    for seconds in (0.5, 1.00003, 29.99997, 30.0):
        for rate in (8000, 11_025, 44_100, 48_000):
            config = AudioConfig(max_seconds=seconds, long_clips="crop")
            assert clip_samples(10**8, rate, config) <= int(seconds * 16_000)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS"),
     ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)  # fmt: skip
def test_a_crop_is_a_stretch_of_the_whole_clip(container, subtype, channels):
    data = encode(speechlike(64_000, channels), 16_000, container, subtype)
    frames = soundfile.SoundFile(io.BytesIO(data)).frames
    whole = decode_audio(data, AudioConfig(max_seconds=60), (frames, 16_000)).astype(int)
    first = decode_audio(data, CROP, (frames, 16_000)).astype(int)
    assert np.abs(first - whole[:24_000]).max() <= 1
    start = int(np.random.default_rng(5).integers(0, frames - 24_000 + 1))
    drawn = [decode_audio(data, CROP, (frames, 16_000), np.random.default_rng(5)).astype(int) for _ in range(2)]
    assert (drawn[0] == drawn[1]).all()
    assert np.abs(drawn[0] - whole[start : start + 24_000]).max() <= 2
    with pytest.raises(BadSample, match="s long"):
        decode_audio(data, DROP, (frames, 16_000))


def test_a_crop_at_another_rate_has_the_planned_length():
    data = encode(speechlike(3 * 44_100), 44_100)
    wave = decode_audio(data, CROP, (3 * 44_100, 44_100), np.random.default_rng(0))
    assert len(wave) == clip_samples(3 * 44_100, 44_100, CROP) == 24_000


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_of_an_hour_of_flac_little_is_read(subtype):
    """A minute stands for the hour: the search for a place reads some blocks however long the file is."""
    frames = 16_000 * 600
    data = encode(np.tile(speechlike(16_000 * 60), (10, 1)), subtype=subtype)
    read = []

    def reader(offset, size):
        read.append(size)
        return data[offset : offset + size]

    wave = decode_audio(MemberReader(len(data), reader), CROP, (frames, 16_000), np.random.default_rng(1))
    start = int(np.random.default_rng(1).integers(0, frames - 24_000 + 1))
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seek(start)
        expected = file.read(24_000, dtype="float32") * 32768
    assert np.abs(wave - expected).max() <= 1
    assert sum(read) < 1_000_000 < len(data)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_fault_of_the_storage_is_no_fault_of_the_sample(container, after, capfd):
    data = encode(speechlike(160_000), 16_000, container, "VORBIS" if container == "OGG" else "PCM_16")
    calls = []

    def broken(offset, size):
        calls.append(offset)
        if len(calls) > after:
            raise DataError("the disk is gone")
        return data[offset : offset + size]

    with pytest.raises(DataError, match="the disk is gone"):
        decode_audio(MemberReader(len(data), broken), CROP, (160_000, 16_000), np.random.default_rng(0))
    assert "cffi" not in capfd.readouterr().err


@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_a_long_clip_that_is_cut_is_refused(container):
    data = encode(speechlike(160_000), 16_000, container)
    for cut, rng in ((len(data) // 8, np.random.default_rng(0)), (len(data) * 7 // 8, None)):
        if container == "FLAC" and rng is None:
            continue  # what is decoded of it is whole, and the rest is not looked at
        with pytest.raises(BadSample):
            decode_audio(data[:cut], CROP, (160_000, 16_000), rng)


def test_damaged_mp3_says_nothing_on_standard_error_of_a_worker():
    """And other output of the worker is there, before and after."""
    code = textwrap.dedent("""
        import io, multiprocessing, sys
        import numpy as np, soundfile
        from trichord.samples.audio import decode_audio
        from trichord.samples.config import AudioConfig

        def work():
            buffer = io.BytesIO()
            soundfile.write(buffer, np.random.default_rng(0).normal(size=32000) / 9, 16000, format="MP3")
            data = bytearray(buffer.getvalue())
            data[3000:3400] = np.random.default_rng(1).bytes(400)
            print("before", file=sys.stderr, flush=True)
            try:
                decode_audio(bytes(data), AudioConfig())
            except Exception as error:
                print(type(error).__name__, flush=True)
            print("after", file=sys.stderr, flush=True)

        work_in = sys.argv[1]
        if work_in == "main":
            work()
        else:
            process = multiprocessing.get_context("fork").Process(target=work)
            process.start()
            process.join()
    """)
    said = {}
    for where in ("main", "worker"):
        done = subprocess.run(
            [sys.executable, "-c", code, where], capture_output=True, text=True, timeout=60, check=True
        )
        said[where] = done.stderr.split("\n")
    assert len(said["main"]) > 3  # else this test no longer shows anything
    assert said["worker"] == ["before", "after", ""]


@pytest.mark.parametrize(("container", "most"), [("WAV", 60_000), ("FLAC", 900_000)])
def test_from_a_shard_too_only_the_crop_is_read(container, most, tmp_path, monkeypatch):
    """And the cap on members is for what is read, not for the clip as a whole."""
    frames = 16_000 * 120
    data = encode(speechlike(frames), 16_000, container)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo(f"k.{container.lower()}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        place = 512
    ref = MemberRef(container.lower(), info.name, place, len(data))
    read = []
    monkeypatch.setattr(reader, "read_range", lambda *args: read.append(args[2]) or read_range(*args))
    item = Item("audio", ref, (frames, 16_000))
    config = SamplesConfig(audio=CROP)
    wave = decode_item(str(tmp_path / "a.tar"), item, config, most, np.random.default_rng(3))
    assert (wave == decode_audio(data, CROP, (frames, 16_000), np.random.default_rng(3))).all()
    assert sum(read) < most < len(data)
