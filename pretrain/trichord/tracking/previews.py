"""Samples of some steps with what the model says of them: `previews.jsonl` and small files in `previews/step-N/`.

Bounded: so many samples of a step, so many steps, pictures of so many pixels, clips of so many seconds. No torch.
"""

from __future__ import annotations

import json
import shutil
import time
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from trichord.tracking.sample_view import SampleView

PREVIEWS_FILE = "previews.jsonl"
PREVIEWS_FOLDER = "previews"
MAX_SAMPLES = 8
MAX_ITEMS = 4  # pictures, and clips, of one sample
MAX_STEPS = 50  # of older ones the texts stay
MAX_PIXELS = 256
MAX_SECONDS = 10.0
MAX_CHARS = 1000


class PreviewsWriter:
    """Of one attempt; rank 0's. sources: names by number; sample_rate: of waveforms, in Hz."""

    def __init__(self, folder: Path, sources: Sequence[str], sample_rate: int, attempt: int) -> None:
        self._folder, self._sources, self._rate, self._attempt = Path(folder), sources, sample_rate, attempt

    def write(self, step: int, samples: Sequence[SampleView]) -> list[dict[str, Any]]:
        """Write what a step's samples look like; returns the lines. Raises OSError: the disk says no."""
        place = self._folder / PREVIEWS_FOLDER / f"step-{step:06d}"
        if place.exists():  # of an attempt whose steps are done again
            shutil.rmtree(place)
        place.mkdir(parents=True)
        lines = [self._line(step, place, i, sample) for i, sample in enumerate(samples[:MAX_SAMPLES])]
        with open(self._folder / PREVIEWS_FILE, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        for old in sorted(place.parent.glob("step-*"), key=_number)[:-MAX_STEPS]:
            shutil.rmtree(old, ignore_errors=True)
        return lines

    def _line(self, step: int, place: Path, number: int, sample: SampleView) -> dict[str, Any]:
        images = [place / f"{number}-{i}.jpg" for i in range(len(sample.pixels[:MAX_ITEMS]))]
        clips = [place / f"{number}-{i}.wav" for i in range(len(sample.waveforms[:MAX_ITEMS]))]
        for path, pixels in zip(images, sample.pixels):
            write_jpeg(path, pixels)
        for path, waveform in zip(clips, sample.waveforms):
            write_wav(path, waveform[: int(MAX_SECONDS * self._rate)], self._rate)
        return {
            "step": step,
            "number": number,
            "time": time.time(),
            "attempt": self._attempt,
            "source": self._sources[sample.source],
            "epoch": sample.epoch,
            "sample": sample.number,
            "given": _short(sample.given),
            "wanted": _short(sample.wanted),
            "predicted": None if sample.predicted is None else _short(sample.predicted),
            "right_frac": sample.right,
            "images": [str(path.relative_to(self._folder)) for path in images],
            "clips": [str(path.relative_to(self._folder)) for path in clips],
        }


def read_previews(folder: Path) -> list[dict[str, Any]]:
    """All lines by step and number; of steps that were done again what was written last, torn lines left out."""
    path, found = Path(folder) / PREVIEWS_FILE, {}
    attempts: dict[int, int] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            line = json.loads(text)
            key = (int(line["step"]), int(line["number"]))
            attempts[key[0]] = max(attempts.get(key[0], 0), int(line.get("attempt", 0)))
            found[key] = line
        except (ValueError, KeyError, TypeError):
            continue
    return [found[key] for key in sorted(found) if int(found[key].get("attempt", 0)) == attempts[key[0]]]


def write_jpeg(path: Path, pixels: np.ndarray) -> None:
    """pixels (3, H, W) uint8, made smaller where a side is longer than `MAX_PIXELS`."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((MAX_PIXELS, MAX_PIXELS))
    image.save(path, "JPEG", quality=85)


def write_wav(path: Path, waveform: np.ndarray, sample_rate: int) -> None:
    """waveform (n,) int16, mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(waveform.astype("<i2").tobytes())


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def _number(path: Path) -> int:
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1
