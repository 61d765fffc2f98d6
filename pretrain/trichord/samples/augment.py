"""Random changes of decoded items, for training only. Every draw comes from the generator of the one sample, which is
keyed by (seed, source, epoch, sample): the same sample in the same epoch looks the same on any number of processes."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from trichord.samples.config import AudioConfig, ImageConfig

_CROP_ATTEMPTS = 10
_ASPECTS = (3 / 4, 4 / 3)
_SPEED_STEPS = 100  # playback speeds are hundredths: ratios of small numbers need small filters


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


def jitter_square(square: np.ndarray, config: ImageConfig, rng: np.random.Generator) -> np.ndarray:
    """Change an RGB square (S, S, 3) uint8 as configured: flip, turn and shift, colours, grey, blur, in this order."""
    if config.horizontal_flip and rng.random() < 0.5:
        square = square[:, ::-1]
    if config.rotate_degrees or config.shift_frac:
        square = _move(square, config, rng)
    if not _recolours(config):
        return square
    image = _jitter_colours(Image.fromarray(np.ascontiguousarray(square)), config, rng)
    if config.grayscale_prob and rng.random() < config.grayscale_prob:
        image = image.convert("L").convert("RGB")
    if config.blur_prob and rng.random() < config.blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*config.blur_sigma)))
    return np.asarray(image)


def _recolours(config: ImageConfig) -> bool:
    colours = (config.brightness_frac, config.contrast_frac, config.saturation_frac, config.hue_frac)
    return any(colours) or bool(config.grayscale_prob or config.blur_prob)


def _move(square: np.ndarray, config: ImageConfig, rng: np.random.Generator) -> np.ndarray:
    """Rotate and shift; what comes in from outside has the border's median colour."""
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    shift_x, shift_y = rng.uniform(-config.shift_frac, config.shift_frac, size=2) * config.size
    border = np.concatenate([square[0], square[-1], square[:, 0], square[:, -1]])
    fill = tuple(int(value) for value in np.median(border, axis=0))
    # Pillow wants the map from a place in the result to its place in the original, about the centre.
    cos, sin, centre = math.cos(angle), math.sin(angle), config.size / 2
    from_x, from_y = -centre - shift_x, -centre - shift_y
    matrix = (
        *(cos, sin, cos * from_x + sin * from_y + centre),
        *(-sin, cos, -sin * from_x + cos * from_y + centre),
    )
    image = Image.fromarray(np.ascontiguousarray(square))
    moved = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill)
    return np.asarray(moved)


def _jitter_colours(image: Image.Image, config: ImageConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue by drawn amounts in a drawn order, as torchvision's ColorJitter does."""
    steps = (
        (config.brightness_frac, lambda image, by: ImageEnhance.Brightness(image).enhance(1 + by)),
        (config.contrast_frac, lambda image, by: ImageEnhance.Contrast(image).enhance(1 + by)),
        (config.saturation_frac, lambda image, by: ImageEnhance.Color(image).enhance(1 + by)),
        (config.hue_frac, _turn_hue),
    )
    if not any(bound for bound, _ in steps):
        return image
    for number in rng.permutation(len(steps)):
        bound, change = steps[number]
        if bound:
            image = change(image, rng.uniform(-bound, bound))
    return image


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    """turn: in full turns of the colour circle."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 256)
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


_NOISE_RANGE_DB = 40  # down to next to nothing: a model that never hears a clean clip takes one for something new


def jitter_waveform(waveform: np.ndarray, config: AudioConfig, rng: np.random.Generator) -> np.ndarray:
    """Change speed, gain and noise of float32 (n,) as configured. The length stays n: a faster clip ends in silence, a
    slower one loses its end, because the length was promised when the row was planned."""
    if config.speed_frac:
        bound = round(config.speed_frac * _SPEED_STEPS)
        speed = _SPEED_STEPS + int(rng.integers(-bound, bound + 1))
        waveform = fit_length(resample(waveform, speed, _SPEED_STEPS), len(waveform))
    if config.gain_db:
        waveform = waveform * np.float32(10 ** (rng.uniform(-config.gain_db, config.gain_db) / 20))
    if config.noise_db is not None:
        loudness = math.sqrt(float(np.mean(np.square(waveform, dtype=np.float64))))
        level = loudness * 10 ** (rng.uniform(config.noise_db - _NOISE_RANGE_DB, config.noise_db) / 20)
        waveform = waveform + np.float32(level) * rng.standard_normal(len(waveform), dtype=np.float32)
    return waveform


def resample(waveform: np.ndarray, rate: float, target_rate: float) -> np.ndarray:
    """Float32 (n,) at `rate` to `target_rate`, band-limited (soxr, quality HQ); length n * target_rate / rate, rounded
    somehow: cut or pad with `fit_length`."""
    if rate == target_rate:
        return waveform
    import soxr

    return soxr.resample(waveform, rate, target_rate)


def fit_length(waveform: np.ndarray, length: int) -> np.ndarray:
    """Cut, or pad with silence, to (length,)."""
    if len(waveform) >= length:
        return waveform[:length]
    return np.concatenate([waveform, np.zeros(length - len(waveform), dtype=waveform.dtype)])
