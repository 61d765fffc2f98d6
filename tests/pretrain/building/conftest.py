"""Real pictures and sounds for the tests of the building room."""

import io
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
    def make(width: int = 4, height: int = 3, format: str = "PNG", color: int = 10, **options) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (width, height), (color, 200, 30)).save(buffer, format, **options)
        return buffer.getvalue()

    return make


@pytest.fixture
def sound() -> Callable[..., bytes]:
    def make(frames: int = 800, rate: int = 8000, format: str = "WAV", **options) -> bytes:
        buffer = io.BytesIO()
        soundfile.write(buffer, np.sin(np.arange(frames) / 9) * 0.3, rate, format=format, **options)
        return buffer.getvalue()

    return make
