"""The fast JPEG path gives Pillow's pixels, refuses what Pillow mends, and decides on the header alone."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

import trichord.samples.image as image_module
from trichord.samples.config import ImageConfig
from trichord.samples.image import decode_image
from trichord.samples.jpeg import MAX_SCANS, decode_jpeg, read_jpeg_header, shrink_factor
from trichord.shards.quarantine import BadSample


def photo(width=512, height=384, seed=0) -> Image.Image:
    """Smooth shapes, edges and fine grain: a spectrum that falls off as photographs' do."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 12, 48, 192):
        grain = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(grain.resize((width, height), Image.Resampling.BICUBIC)) / (cells / 3) ** 0.5
    pixels -= pixels.min()
    return Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8))


def encode(image, image_format="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pillow_square(data: bytes, size: int) -> np.ndarray:
    """Pillow's centre crop and resize, as the reference."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, upper, left + side, upper + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1).astype(int)


PHOTO = photo()
VARIANTS = {
    "plain": encode(PHOTO, quality=90),
    "progressive": encode(PHOTO, quality=85, progressive=True),
    "4:4:4": encode(PHOTO, quality=95, subsampling=0),
    "4:2:2": encode(PHOTO, quality=80, subsampling=1),
    "grey": encode(PHOTO.convert("L"), quality=90),
    "cmyk": encode(PHOTO.convert("CMYK"), quality=90),
    "rgb kept": encode(PHOTO, quality=90, keep_rgb=True),
    "restart markers": encode(PHOTO, quality=90, restart_marker_rows=1),
    "odd size": encode(photo(333, 251), quality=90),
    "smaller than wanted": encode(photo(60, 50), quality=90),
    "icc and comment": encode(PHOTO, quality=90, icc_profile=b"x" * 300, comment=b"hello"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_jpeg_is_what_pillow_makes_of_it(name):
    """Torch's and Pillow's resize differ by a level, two where they enlarge; the decoders give the same pixels."""
    data = VARIANTS[name]
    difference = np.abs(decode_image(data, ImageConfig(size=224)) - pillow_square(data, 224))
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    header = read_jpeg_header(data)
    assert (decode_jpeg(data, header, 1) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_as_pillow_turns_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(320, 240), quality=95, exif=exif)
    difference = np.abs(decode_image(data, ImageConfig(size=112)) - pillow_square(data, 112))
    assert difference.max() <= 1
    size = (240, 320) if orientation >= 5 else (320, 240)
    decode_image(data, ImageConfig(size=112), indexed_size=size)
    with pytest.raises(BadSample, match="its index says"):
        decode_image(data, ImageConfig(size=112), indexed_size=size[::-1])


def test_orientation_in_xmp_counts_too():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode(photo(320, 240), quality=95, xmp=xmp)
    assert (
        np.abs(decode_image(data, ImageConfig(size=112), indexed_size=(240, 320)) - pillow_square(data, 112)).max() <= 1
    )


@pytest.mark.parametrize(
    ("size", "factor", "mean", "most"),
    [((1024, 768), 2, 0.6, 4), ((1600, 1201), 2, 1.0, 6), ((2801, 2100), 4, 1.2, 6)],
)
def test_reduced_decoding_stays_close_to_the_full_one(size, factor, mean, most):
    """Measured: mean 0.4 to 0.9 levels, 99.9 % within 2 to 4; photographs: mean 0.4 to 0.8, 99.9 % within 8."""
    data = encode(photo(*size), quality=90)
    assert shrink_factor(min(size), 224) == factor
    difference = np.abs(decode_image(data, ImageConfig(size=224)) - pillow_square(data, 224))
    assert difference.mean() < mean
    assert np.percentile(difference, 99.9) <= most


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["plain", "odd size", "cmyk", "progressive", "grey"])
def test_reduced_decoding_gives_the_size_it_promises(name, factor):
    header = read_jpeg_header(VARIANTS[name])
    shape = decode_jpeg(VARIANTS[name], header, factor).shape
    assert shape == (-(-header.height // factor), -(-header.width // factor), 3)


def test_a_crop_is_decoded_large_enough_for_itself():
    """A small crop of a large picture must not come from a thumbnail of it."""
    data = encode(photo(2048, 2048), quality=90)
    factors = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        config = ImageConfig(size=224, resize="random_resized_crop", min_crop_frac=0.02)
        box = image_module._crop_box((2048, 2048), config, rng)
        factor = shrink_factor(min(box[2] - box[0], box[3] - box[1]), 224)
        factors.append(factor)
        assert min(box[2] - box[0], box[3] - box[1]) / factor >= 1.5 * 224 or factor == 1
        assert decode_image(data, config, rng=np.random.default_rng(seed)).shape == (3, 224, 224)
    assert {1, 2} <= set(factors)


@pytest.mark.parametrize("name", ["plain", "progressive", "grey", "cmyk"])
def test_cut_files_are_refused_wherever_they_are_cut(name):
    data = VARIANTS[name]
    for share in (0.01, 0.1, 0.3, 0.5, 0.9, 0.999):
        with pytest.raises(BadSample, match="cannot be decoded"):
            decode_image(data[: int(len(data) * share)], ImageConfig(size=32))


@pytest.mark.parametrize("name", ["plain", "grey", "cmyk"])
def test_noise_in_the_data_is_refused(name):
    """Measured: 60 of 60; of runs of 8 bytes 25 to 46, where Pillow refuses 1: such codes are as a rule valid ones."""
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data = bytearray(VARIANTS[name])
        place = int(rng.integers(1000, len(data) - 1050))
        data[place : place + 1000] = rng.bytes(1000)
        try:
            decode_image(bytes(data), ImageConfig(size=32))
        except BadSample:
            refused += 1
    assert refused >= 59


def test_an_appended_tail_is_no_damage():
    data = VARIANTS["plain"]
    assert (decode_image(data + b"\0" * 500, ImageConfig()) == decode_image(data, ImageConfig())).all()


def test_a_huge_picture_is_refused_by_its_header(monkeypatch):
    data = bytearray(VARIANTS["plain"])
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = (65_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(image_module, "decode_jpeg", lambda *args: pytest.fail("it was decoded"))
    with pytest.raises(BadSample, match="65000 x 65000 pixels"):
        decode_image(bytes(data), ImageConfig())


def test_more_scans_than_any_honest_file_has_are_refused():
    data = VARIANTS["progressive"]
    end, last_scan = data.rindex(b"\xff\xd9"), data.rindex(b"\xff\xda")
    bomb = data[:end] + data[last_scan:end] * MAX_SCANS + data[end:]
    with pytest.raises(BadSample, match=f"more than {MAX_SCANS} scans"):
        decode_image(bomb, ImageConfig())


def test_jpeg_that_the_fast_decoder_does_not_know_goes_to_pillow(monkeypatch):
    monkeypatch.setattr(image_module, "read_jpeg_header", lambda data: None)
    data = VARIANTS["plain"]
    assert np.abs(decode_image(data, ImageConfig()) - pillow_square(data, 224)).max() <= 1


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(image_format):
    first, second = photo(64, 64, seed=1), photo(64, 64, seed=2)
    moving = encode(first, image_format, save_all=True, append_images=[second], lossless=True)
    still = encode(first, image_format, lossless=True)
    config = ImageConfig(size=32)
    assert (decode_image(moving, config) == decode_image(still, config)).all()


def test_a_png_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = encode(Image.new("1", (12_000, 9_000)), "PNG")
    assert len(data) < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda *args: pytest.fail("it was decoded"))
    with pytest.raises(BadSample, match="12000 x 9000 pixels"):
        decode_image(data, ImageConfig())
