"""Pictures of few bytes and many pixels: small in memory, and the same to the model."""

import io

import numpy as np
import pytest
from PIL import Image

from trichord.samples import image as image_module
from trichord.samples.config import ImageConfig
from trichord.samples.image import decode_image


def picture(mode: str, size=(700, 500)) -> bytes:
    """A smooth picture in one of Pillow's modes; with alpha where the mode has some, turned by EXIF."""
    columns, rows = np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1])[:, None]
    image = Image.fromarray((np.stack(np.broadcast_arrays(columns, rows, 128), -1)).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16)) * 256)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(np.broadcast_to(columns, size[::-1]).astype(np.uint8)))
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16", "P", "1"])
def test_large_picture_is_converted_band_by_band_and_looks_the_same(mode, monkeypatch):
    data = picture(mode)
    config = ImageConfig(size=32, resize="center_crop")
    whole = decode_image(data, config, (500, 700))
    sizes = []
    convert = image_module.to_rgb
    monkeypatch.setattr(image_module, "to_rgb", lambda image: sizes.append(image.size) or convert(image))
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(image_module, "BAND_PIXELS", 20_000)
    banded = decode_image(data, config, (500, 700))
    assert len(sizes) > 10
    assert max(width * height for width, height in sizes) <= 20_000
    difference = np.abs(whole.astype(int) - banded.astype(int))
    assert difference.mean() < 1.5
    assert difference.max() <= (40 if mode in ("P", "1") else 4)  # dithered ones differ more


def test_picture_of_wanted_size_is_not_reduced(monkeypatch):
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(image_module, "_reduced", lambda *_: pytest.fail("too small to be reduced"))
    decode_image(picture("RGB", (100, 100)), ImageConfig(size=64), (100, 100))
