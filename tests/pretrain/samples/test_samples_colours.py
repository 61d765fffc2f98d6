"""Colour augmentation: bounded, drawn from the sample's generator, and silent where it is not asked for."""

import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from trichord.samples.augment import jitter_square
from trichord.samples.config import ImageConfig
from trichord.samples.image import decode_image

SQUARE = np.random.default_rng(0).integers(30, 200, (32, 32, 3), dtype=np.uint8)


def jitter(config, seed=0, square=SQUARE):
    return jitter_square(square, config, np.random.default_rng(seed)).astype(int)


@pytest.mark.parametrize(
    "options",
    [
        {"brightness_frac": 0.4},
        {"contrast_frac": 0.4},
        {"saturation_frac": 0.4},
        {"hue_frac": 0.2},
        {"grayscale_prob": 0.5},
        {"blur_prob": 0.5},
        {"brightness_frac": 0.4, "contrast_frac": 0.4, "saturation_frac": 0.4, "hue_frac": 0.1, "blur_prob": 0.3},
    ],
)
def test_each_change_follows_the_generator(options):
    config = ImageConfig(size=32, **options)
    draws = [jitter(config, seed) for seed in (1, 1, *range(2, 12))]
    assert (draws[0] == draws[1]).all()
    assert any((draw != draws[0]).any() for draw in draws[2:])
    assert any((draw != SQUARE).any() for draw in draws)


def test_brightness_stays_within_its_bound():
    ratios = [jitter(ImageConfig(size=32, brightness_frac=0.3), seed).mean() / SQUARE.mean() for seed in range(60)]
    assert 0.69 < min(ratios) < 0.78
    assert 1.22 < max(ratios) < 1.31


def test_contrast_keeps_the_mean_and_saturation_keeps_the_grey():
    spread = [jitter(ImageConfig(size=32, contrast_frac=0.3), seed).std() / SQUARE.std() for seed in range(40)]
    assert 0.69 < min(spread) < 0.8 < 1.2 < max(spread) < 1.31
    grey = np.full((32, 32, 3), 90, dtype=np.uint8)
    assert all(
        (jitter(ImageConfig(size=32, saturation_frac=1, contrast_frac=1), s, grey) == 90).all() for s in range(9)
    )


def test_hue_turns_red_towards_its_neighbours_only():
    red = np.zeros((32, 32, 3), dtype=np.uint8)
    red[..., 0] = 240
    for seed in range(20):
        pixel = jitter(ImageConfig(size=32, hue_frac=1 / 6), seed, red)[0, 0]
        assert pixel[0] >= 230  # a sixth of the circle ends at yellow and at magenta
        assert min(pixel[1], pixel[2]) <= 2


def test_shares_of_grey_and_blurred_draws_are_as_configured():
    grey = [np.ptp(jitter(ImageConfig(size=32, grayscale_prob=0.25), seed), axis=-1).max() == 0 for seed in range(400)]
    blurred = [jitter(ImageConfig(size=32, blur_prob=0.25), seed).std() < SQUARE.std() for seed in range(400)]
    assert 0.18 < np.mean(grey) < 0.32
    assert 0.18 < np.mean(blurred) < 0.32


def test_blur_grows_with_its_sigma():
    little, much = (ImageConfig(size=32, blur_prob=1, blur_sigma=(s, s)) for s in (0.5, 3.0))
    assert jitter(little).std() > 1.5 * jitter(much).std()


def test_what_is_not_asked_for_draws_nothing():
    """So that a new kind of change leaves the draws of an old config as they were."""
    rng = np.random.default_rng(3)
    jitter_square(SQUARE, ImageConfig(size=32), rng)
    assert rng.random() == np.random.default_rng(3).random()


def test_evaluation_changes_nothing():
    buffer = io.BytesIO()
    Image.fromarray(SQUARE).save(buffer, "PNG")
    config = ImageConfig(size=32, brightness_frac=1, hue_frac=0.5, grayscale_prob=1, blur_prob=1, horizontal_flip=True)
    assert (decode_image(buffer.getvalue(), config) == SQUARE.transpose(2, 0, 1)).all()
    assert (decode_image(buffer.getvalue(), config, rng=np.random.default_rng(0)) != SQUARE.transpose(2, 0, 1)).any()


@pytest.mark.parametrize("sigma", [(2.0, 1.0), (0.0, 1.0), (1.0,)])
def test_sigmas_out_of_order_are_refused(sigma):
    with pytest.raises(ValidationError):
        ImageConfig(blur_sigma=sigma)
