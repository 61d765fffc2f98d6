"""Which configs draw at random (one that is forgotten there would silently train without its augmentation), and which
can select nothing."""

import pytest
from pydantic import ValidationError

from trichord.samples.config import AudioConfig, ImageConfig
from trichord.shards.config import FieldsConfig, FiltersConfig

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


@pytest.mark.parametrize(
    ("field", "extensions", "words"),
    [
        ("image", ["gif"], r"'gif' cannot be decoded: image takes jpg.*convert the members to JPEG"),
        ("image", [".jpg"], "without the dot, 'jpg'"),
        ("audio", ["jpg"], "'jpg' holds pictures, never audio; audio takes flac"),
        ("image", ["left.txt"], "holds text, never image"),
        ("audio", ["m4a"], "convert the members to FLAC"),
        ("text", ["a b"], "no extension of a member"),
    ],
)
def test_extensions_that_can_never_match_are_refused(field, extensions, words):
    with pytest.raises(ValidationError, match=words):
        FieldsConfig.model_validate({field: extensions})


def test_one_extension_or_several_in_webdatasets_form_are_a_list():
    fields = FieldsConfig.model_validate({"image": "jpg;jpeg", "audio": "oga", "text": "caption"})
    assert (fields.image, fields.audio, fields.text) == (("jpg", "jpeg"), ("oga",), ("caption",))


def test_bounds_that_leave_nothing_are_refused():
    with pytest.raises(ValidationError, match="min_audio_seconds 5 is above max_audio_seconds 2"):
        FiltersConfig(min_audio_seconds=5, max_audio_seconds=2)
    with pytest.raises(ValidationError, match="min_text_chars"):
        FiltersConfig(min_text_chars=5, max_text_chars=2)
    FiltersConfig(min_audio_seconds=2, max_audio_seconds=2)
