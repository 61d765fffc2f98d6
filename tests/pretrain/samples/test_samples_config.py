"""Which configs draw at random: one that is forgotten there would silently train without its augmentation."""

import pytest

from trichord.samples.config import AudioConfig, ImageConfig

IMAGE_CHANGES = {
    "resize": "random_resized_crop",
    "rotate_degrees": 5,
    "shift_frac": 0.1,
    "horizontal_flip": True,
    "brightness_frac": 0.1,
    "contrast_frac": 0.1,
    "saturation_frac": 0.1,
    "hue_frac": 0.1,
    "grayscale_prob": 0.1,
    "blur_prob": 0.1,
}
AUDIO_CHANGES = {"speed_frac": 0.1, "gain_db": 3, "noise_db": -30, "long_clips": "crop"}
NO_CHANGES = {
    *("size", "min_crop_frac", "mean", "std", "max_pixels", "blur_sigma"),
    *("sample_rate", "max_seconds", "mel"),
}


@pytest.mark.parametrize(("key", "value"), IMAGE_CHANGES.items())
def test_images_that_training_changes(key, value):
    assert ImageConfig(**{key: value}).draws
    assert not ImageConfig().draws


@pytest.mark.parametrize(("key", "value"), AUDIO_CHANGES.items())
def test_clips_that_training_changes(key, value):
    assert AudioConfig(**{key: value}).draws
    assert not AudioConfig().draws


def test_every_key_is_known_to_change_or_not():
    keys = set(ImageConfig.model_fields) | set(AudioConfig.model_fields)
    assert keys == {*IMAGE_CHANGES, *AUDIO_CHANGES, *NO_CHANGES}, "say of the new key whether training draws by it"
