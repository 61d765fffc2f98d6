"""Image bytes to the square of pixels that the model sees. Normalisation happens on the model's device."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from trichord.samples.augment import jitter_square, random_crop_box
from trichord.samples.config import ImageConfig
from trichord.shards.probes import IMAGE_FORMATS
from trichord.shards.quarantine import BadSample

Box = tuple[float, float, float, float]


def decode_image(
    data: bytes,
    config: ImageConfig,
    indexed_size: tuple[int, int] | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Decode, turn upright (EXIF), crop and resize to uint8 (3, size, size) RGB.

    Args:
        indexed_size: (width, height) upright, as the sidecar has it; a different one is a content fault.
        rng: draws the augmentation; None (evaluation) crops the centre where training crops at random.

    Raises:
        BadSample: not a named image format, broken, cut short, over `max_pixels`, or not of the indexed size.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap is config.max_pixels
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            check_pixels(image.size, config)
            square = _resize_upright(image, config, indexed_size, rng)
    except (BadSample, MemoryError, ImportError):
        raise
    except Exception as error:  # the bytes are in memory: whatever the decoder says is about them
        raise BadSample(f"the image cannot be decoded: {describe_fault(error)}") from error
    if rng is not None:
        square = jitter_square(square, config, rng)
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def check_pixels(size: tuple[int, int], config: ImageConfig) -> None:
    """Raises BadSample when an image of (width, height) is over the cap; nothing has been decoded by then."""
    width, height = size
    if width * height > config.max_pixels:
        raise BadSample(
            f"the image has {width} x {height} pixels; samples.image.max_pixels allows {config.max_pixels} in all"
        )


def describe_fault(error: Exception) -> str:
    """The decoder's words without memory addresses, so that they are the same on every attempt."""
    return re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "the data", str(error)) or type(error).__name__


def _resize_upright(
    image: Image.Image, config: ImageConfig, indexed_size: tuple[int, int] | None, rng: np.random.Generator | None
) -> Image.Image:
    stored_size = image.size
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF orientations that swap width and height
    upright_size = (stored_size[1], stored_size[0]) if turned else stored_size
    if indexed_size is not None and upright_size != tuple(indexed_size):
        raise BadSample(f"the image has {upright_size} pixels upright, its index says {tuple(indexed_size)}")
    box = _crop_box(upright_size, config, rng)
    # A JPEG decodes faster at a half, quarter or eighth. Twice the wanted size is left for the filter below.
    shrink = min(box[2] - box[0], box[3] - box[1]) / (2 * config.size)
    if shrink >= 2:
        image.draft(None, (int(stored_size[0] / shrink), int(stored_size[1] / shrink)))
    image = to_rgb(ImageOps.exif_transpose(image))
    scale_x, scale_y = image.width / upright_size[0], image.height / upright_size[1]
    right, lower = min(box[2] * scale_x, image.width), min(box[3] * scale_y, image.height)
    scaled = (box[0] * scale_x, box[1] * scale_y, right, lower)
    return image.resize((config.size, config.size), Image.Resampling.BICUBIC, box=scaled)


def _crop_box(size: tuple[int, int], config: ImageConfig, rng: np.random.Generator | None) -> Box:
    """The part of an upright (width, height) image that becomes the square: left, upper, right, lower."""
    width, height = size
    if config.resize == "squash":
        return 0.0, 0.0, float(width), float(height)
    if config.resize == "random_resized_crop" and rng is not None:
        box = random_crop_box(width, height, config.min_crop_frac, rng)
        if box is not None:
            return box
    side = float(min(width, height))
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent becomes white, 16-bit grey keeps its upper 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")
