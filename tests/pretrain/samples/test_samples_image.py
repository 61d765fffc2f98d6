"""Images of every mode and shape become the same uint8 square; broken ones a BadSample, never something quiet."""

import io

import numpy as np
import pytest
from PIL import Image

from trichord.samples.config import ImageConfig
from trichord.samples.image import decode_image
from trichord.shards.quarantine import BadSample

CONFIG = ImageConfig(size=16, resize="squash")
RED, BLUE = (200, 30, 20), (10, 20, 220)


def encode(image, image_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def halves(width=32, height=32, mode="RGB") -> Image.Image:
    """Upper half red, lower half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image.convert(mode)


def assert_halves(pixels, tolerance=0):
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    for rows, colour in ((slice(0, 6), RED), (slice(10, 16), BLUE)):
        assert np.abs(pixels[:, rows].astype(int) - np.array(colour)[:, None, None]).max() <= tolerance


@pytest.mark.parametrize(
    ("image_format", "mode", "options", "tolerance"),
    [
        ("PNG", "RGB", {}, 0),
        ("PNG", "RGBA", {}, 0),
        ("PNG", "P", {}, 12),
        ("JPEG", "RGB", {"quality": 95}, 12),
        ("JPEG", "CMYK", {"quality": 95}, 12),
        ("WEBP", "RGB", {"lossless": True}, 0),
    ],
)
def test_formats_and_modes(image_format, mode, options, tolerance):
    assert_halves(decode_image(encode(halves(mode=mode), image_format, **options), CONFIG), tolerance)


def test_grey_has_three_equal_channels():
    pixels = decode_image(encode(Image.new("L", (20, 10), 77)), CONFIG)
    assert (pixels == 77).all()


def test_sixteen_bit_grey_keeps_its_upper_bits():
    image = Image.fromarray(np.full((8, 8), 0x4D12, dtype=np.uint16))
    assert (decode_image(encode(image), CONFIG) == 0x4D).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_becomes_white(mode):
    assert (decode_image(encode(Image.new(mode, (8, 8), 0)), CONFIG) == 255).all()


def test_palette_with_transparency_becomes_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0] * 256)
    assert (decode_image(encode(image, transparency=0), CONFIG) == 255).all()


@pytest.mark.parametrize(("orientation", "turn"), [(3, 180), (6, 90), (8, 270)])
def test_exif_rotation_is_undone(orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = halves(48, 32)
    data = encode(upright.rotate(turn, expand=True), "JPEG", quality=95, exif=exif)
    assert_halves(decode_image(data, CONFIG, indexed_size=(48, 32)), 12)


def test_centre_crop_takes_the_middle():
    image = Image.new("RGB", (48, 16), RED)
    image.paste(BLUE, (16, 0, 32, 16))
    pixels = decode_image(encode(image), ImageConfig(size=16, resize="center_crop"))
    assert (pixels == np.array(BLUE)[:, None, None]).all()


def test_large_jpeg_decoded_at_reduced_size_looks_the_same():
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    image = Image.fromarray(
        np.stack([np.tile(ramp, (480, 1)), np.tile(ramp[:480, None], (1, 640)), np.full((480, 640), 9)], -1).astype(
            np.uint8
        )
    )
    jpeg, png = encode(image, "JPEG", quality=95), encode(image)
    config = ImageConfig(size=32, resize="center_crop")
    difference = np.abs(decode_image(jpeg, config).astype(int) - decode_image(png, config).astype(int))
    assert difference.max() <= 6


def test_over_the_pixel_cap_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: pytest.fail("it was decoded"))
    with pytest.raises(BadSample, match=r"100 x 50 pixels; samples\.image\.max_pixels allows 4999"):
        decode_image(encode(Image.new("L", (100, 50))), ImageConfig(size=16, max_pixels=4999))


def test_other_size_than_indexed_is_refused():
    with pytest.raises(BadSample, match=r"\(32, 32\) pixels upright, its index says \(32, 31\)"):
        decode_image(encode(halves()), CONFIG, indexed_size=(32, 31))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_images_are_refused(image_format, share):
    data = encode(NOISE, image_format)
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode_image(data[: int(len(data) * share)], CONFIG)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x80\x04cos\nsystem\n"])
def test_no_image_at_all_is_refused_in_the_same_words_each_time(data):
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadSample) as caught:
            decode_image(data, CONFIG)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1


def test_formats_that_are_not_named_are_refused():
    with pytest.raises(BadSample):
        decode_image(encode(halves(), "GIF"), CONFIG)


@pytest.mark.parametrize("resize", ["center_crop", "random_resized_crop", "squash"])
def test_augmentation_is_a_function_of_the_generator(resize):
    config = ImageConfig(
        size=16, resize=resize, min_crop_frac=0.3, rotate_degrees=20, shift_frac=0.2, horizontal_flip=True
    )
    data = encode(NOISE)
    draws = [decode_image(data, config, rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()
    assert (decode_image(data, config) == decode_image(data, config)).all()


def test_shift_moves_the_picture_and_fills_with_the_border_colour():
    image = Image.new("L", (16, 16), 200)
    image.putpixel((8, 8), 0)
    config = ImageConfig(size=16, resize="squash", shift_frac=0.4)
    pixels = decode_image(encode(image), config, rng=np.random.default_rng(3))[0].astype(int)
    row, column = np.unravel_index(pixels.argmin(), pixels.shape)
    rng = np.random.default_rng(3)
    rng.uniform(0, 0)  # the angle comes first
    shift_x, shift_y = rng.uniform(-0.4, 0.4, size=2) * 16
    assert abs(column - (8 + shift_x)) <= 1
    assert abs(row - (8 + shift_y)) <= 1
    assert pixels[0, 0] == pixels[-1, -1] == 200


def test_random_crop_of_an_extreme_shape_falls_back_to_the_centre():
    config = ImageConfig(size=8, resize="random_resized_crop")
    assert decode_image(encode(Image.new("RGB", (400, 2))), config, rng=np.random.default_rng(0)).shape == (3, 8, 8)
