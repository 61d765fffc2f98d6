"""Real tars for the tests of the shards room, written by other people's code."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """No test reads or fills the user's sidecar cache."""
    monkeypatch.setenv("TRICHORD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def png() -> Callable[..., bytes]:
    def make(width: int = 4, height: int = 3, format: str = "PNG", **options) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (10, 200, 30)).save(buffer, format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def sound() -> Callable[..., bytes]:
    def make(frames: int = 800, rate: int = 8000, format: str = "WAV", channels: int = 1, **options) -> bytes:
        buffer = io.BytesIO()
        wave = np.sin(np.arange(frames * channels) / 9).reshape(frames, channels) * 0.3
        soundfile.write(buffer, wave, rate, format=format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def write_tar(tmp_path) -> Callable[..., str]:
    """write_tar([(name, bytes), ...]) -> path, by the standard library."""

    def write(members, name: str = "s.tar", format: int = tarfile.PAX_FORMAT) -> str:
        path = tmp_path / name
        with tarfile.open(path, "w", format=format) as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return str(path)

    return write


@pytest.fixture
def text_shards(tmp_path) -> Callable[..., list[str]]:
    """text_shards([3, 2]) -> two tars of webdataset.ShardWriter with texts `0`, `1`, ... through both."""

    def write(sizes, folder: str = "texts") -> list[str]:
        import webdataset

        (tmp_path / folder).mkdir(exist_ok=True)
        paths, number = [], 0
        for shard, size in enumerate(sizes):
            path = str(tmp_path / folder / f"t-{shard:03d}.tar")
            with webdataset.TarWriter(path, encoder=False) as writer:
                for _ in range(size):
                    writer.write({"__key__": f"{number:05d}", "txt": str(number).encode()})
                    number += 1
            paths.append(path)
        return paths

    return write
