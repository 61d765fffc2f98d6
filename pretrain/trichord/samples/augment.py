"""Random changes of decoded items, for training only. Every draw comes from the generator of the one sample, which is
keyed by (seed, source, epoch, sample): the same sample in the same epoch looks the same on any number of processes."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from trichord.samples.config import AudioConfig, ImageConfig

_CROP_ATTEMPTS = 10
_ASPECTS = (3 / 4, 4 / 3)
_SPEED_STEPS = 100  # playback speeds are hundredths, so that each needs one small resampling filter


def random_crop_box(
    width: int, height: int, min_crop_frac: float, rng: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """Inception's crop: area drawn from [min_crop_frac, 1] of the image, aspect from [3/4, 4/3] on a log scale.

    None when no draw in ten fits into the image; the caller then takes the centre.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_crop_frac, 1.0)
        aspect = math.exp(rng.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1])))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if 1 <= crop_width <= width and 1 <= crop_height <= height:
            left, upper = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return left, upper, min(left + crop_width, width), min(upper + crop_height, height)
    return None


def jitter_square(image: Image.Image, config: ImageConfig, rng: np.random.Generator) -> Image.Image:
    """Flip, rotate and shift an RGB square as configured; what comes in from outside has the border's median colour."""
    if config.horizontal_flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if not config.rotate_degrees and not config.shift_frac:
        return image
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    shift_x, shift_y = rng.uniform(-config.shift_frac, config.shift_frac, size=2) * config.size
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    fill = tuple(int(value) for value in np.median(border, axis=0))
    # Pillow wants the map from a place in the result to its place in the original, about the centre.
    cos, sin, centre = math.cos(angle), math.sin(angle), config.size / 2
    from_x, from_y = -centre - shift_x, -centre - shift_y
    matrix = (
        *(cos, sin, cos * from_x + sin * from_y + centre),
        *(-sin, cos, -sin * from_x + cos * from_y + centre),
    )
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)


_NOISE_RANGE_DB = 40  # down to next to nothing: a model that never hears a clean clip takes one for something new


def jitter_waveform(waveform: np.ndarray, config: AudioConfig, rng: np.random.Generator) -> np.ndarray:
    """Change speed, gain and noise of float32 (n,) as configured. The length stays n: a faster clip ends in silence, a
    slower one loses its end, because the length was promised when the row was planned."""
    if config.speed_frac:
        bound = round(config.speed_frac * _SPEED_STEPS)
        speed = _SPEED_STEPS + int(rng.integers(-bound, bound + 1))
        waveform = fit_length(resample(waveform, _SPEED_STEPS, speed), len(waveform))
    if config.gain_db:
        waveform = waveform * np.float32(10 ** (rng.uniform(-config.gain_db, config.gain_db) / 20))
    if config.noise_db is not None:
        loudness = math.sqrt(float(np.mean(np.square(waveform, dtype=np.float64))))
        level = loudness * 10 ** (rng.uniform(config.noise_db - _NOISE_RANGE_DB, config.noise_db) / 20)
        waveform = waveform + np.float32(level) * rng.standard_normal(len(waveform), dtype=np.float32)
    return waveform


def resample(waveform: np.ndarray, up: int, down: int) -> np.ndarray:
    """Float32 (n,) to float32 (ceil(n * up / down),), by a polyphase filter."""
    divisor = math.gcd(up, down)
    up, down = up // divisor, down // divisor
    if up == down:
        return waveform
    from scipy.signal import resample_poly  # half a second to import; most clips have the model's rate

    return resample_poly(waveform, up, down, window=_filter(up, down)).astype(np.float32, copy=False)


@lru_cache(maxsize=256)
def _filter(up: int, down: int) -> np.ndarray:
    """scipy's own default for resample_poly, designed once per pair of rates and not once per clip."""
    from scipy.signal import firwin

    widest = max(up, down)
    return firwin(20 * widest + 1, 1 / widest, window=("kaiser", 5.0)).astype(np.float32)  # pyright: ignore[reportArgumentType]


def fit_length(waveform: np.ndarray, length: int) -> np.ndarray:
    """Cut, or pad with silence, to (length,)."""
    if len(waveform) >= length:
        return waveform[:length]
    return np.concatenate([waveform, np.zeros(length - len(waveform), dtype=waveform.dtype)])
