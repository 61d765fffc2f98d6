"""Image bytes to the square of pixels that the model sees. Normalisation happens on the model's device.

JPEG goes through samples/jpeg.py, everything else through Pillow; from the crop on both are the same.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image, ImageOps

from trichord.samples.augment import jitter_square, random_crop_box
from trichord.samples.config import ImageConfig
from trichord.samples.jpeg import JPEG_MAGIC, decode_jpeg, read_jpeg_header, shrink_factor, turn_upright
from trichord.shards.probes import IMAGE_FORMATS
from trichord.shards.quarantine import BadSample

Box = tuple[float, float, float, float]
BAND_PIXELS = 2**20
LARGE_PIXELS = 4 * 2**20
"""Above this a picture that is much larger than wanted is reduced while it is converted to RGB."""


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
        header = read_jpeg_header(data) if data.startswith(JPEG_MAGIC) else None
        if header is None:
            pixels, size, box = _decode_with_pillow(data, config, indexed_size, rng)
        else:
            turned = header.orientation >= 5  # EXIF orientations that swap width and height
            size = (header.height, header.width) if turned else (header.width, header.height)
            check_pixels(size, config)
            _check_indexed(size, indexed_size)
            box = _crop_box(size, config, rng)
            factor = shrink_factor(min(box[2] - box[0], box[3] - box[1]), config.size)
            pixels = turn_upright(decode_jpeg(data, header, factor), header.orientation)
        square = _resize(pixels, size, box, config.size)
    except (BadSample, MemoryError, ImportError):
        raise
    except Exception as error:  # the bytes are in memory: whatever the decoder says is about them
        raise BadSample(f"the image cannot be decoded: {describe_fault(error)}") from error
    if rng is not None:
        square = jitter_square(square, config, rng)
    return np.ascontiguousarray(square.transpose(2, 0, 1))


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


def _check_indexed(size: tuple[int, int], indexed_size: tuple[int, int] | None) -> None:
    if indexed_size is not None and size != tuple(indexed_size):
        raise BadSample(f"the image has {size} pixels upright, its index says {tuple(indexed_size)}")


def _decode_with_pillow(
    data: bytes, config: ImageConfig, indexed_size: tuple[int, int] | None, rng: np.random.Generator | None
) -> tuple[np.ndarray, tuple[int, int], Box]:
    """Upright pixels (H, W, 3) of the first frame, their (width, height), and the box to crop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the cap is config.max_pixels
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    check_pixels(image.size, config)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    size = (image.height, image.width) if turned else image.size
    _check_indexed(size, indexed_size)
    box = _crop_box(size, config, rng)
    ImageOps.exif_transpose(image, in_place=True)
    shrink = int(
        min(box[2] - box[0], box[3] - box[1]) // (2 * config.size)
    )  # twice the wanted size is left for _resize
    large = image.width * image.height > LARGE_PIXELS and shrink >= 2
    return np.asarray(_reduced(image, shrink) if large else to_rgb(image)), size, box


def _reduced(image: Image.Image, factor: int) -> Image.Image:
    """RGB, `factor` times smaller; band by band, since few bytes may be many pixels, and are never whole in RGB."""
    width, height = image.size
    small = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = factor * max(1, BAND_PIXELS // (width * factor))
    for top in range(0, height, rows):
        band = to_rgb(image.crop((0, top, width, min(top + rows, height))))
        small.paste(band.reduce(factor), (0, top // factor))
    return small


def _resize(pixels: np.ndarray, size: tuple[int, int], box: Box, side: int) -> np.ndarray:
    """The box of an upright picture as (side, side, 3), by an antialiased bicubic filter that sees the box alone.

    pixels: (H, W, 3) uint8, the picture of (width, height) `size` or a reduction of it. box: in pixels of `size`; its
    edges are rounded to those of `pixels`. torch's filter differs from Pillow's by one level at most in practice and
    takes a third of the time.
    """
    import torch

    height, width = pixels.shape[:2]
    left, right = _edges(box[0], box[2], width / size[0], width)
    upper, lower = _edges(box[1], box[3], height / size[1], height)
    crop = pixels[upper:lower, left:right]
    if crop.shape[:2] == (side, side):
        return crop
    if min(crop.strides) < 0 or not crop.flags.writeable:
        crop = crop.copy()  # neither is for torch
    image_CHW = torch.from_numpy(crop).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(image_CHW[None], (side, side), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _edges(low: float, high: float, scale: float, length: int) -> tuple[int, int]:
    """Whole pixels of one axis, at least one."""
    start = min(round(low * scale), length - 1)
    return start, max(min(round(high * scale), length), start + 1)


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
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; what is transparent becomes white, 16-bit grey keeps its upper 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image) >> 8
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")
