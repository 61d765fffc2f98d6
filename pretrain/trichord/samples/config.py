"""Config of the samples room: how bytes become pixels, waveforms and text, and the caps on each."""

from typing import Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from trichord.core.leaf import Leaf


class ImageConfig(Leaf):
    """Decoding, resizing and augmentation of images."""

    size: int = Field(default=224, ge=4)
    """Side of the square the model sees, in pixels."""
    resize: Literal["squash", "center_crop", "random_resized_crop"] = "center_crop"
    min_crop_frac: float = Field(default=0.9, gt=0, le=1)
    """random_resized_crop: smallest share of the area. 0.9 keeps what a caption speaks of; ImageNet uses 0.08."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    max_pixels: int = Field(default=50_000_000, ge=1)
    """Images with more pixels than this are quarantined before they are decoded."""
    rotate_degrees: float = Field(default=0.0, ge=0, le=180)
    """Training only: rotation drawn from +-this."""
    shift_frac: float = Field(default=0.0, ge=0, le=0.5)
    """Training only: translation drawn from +-this share of the side."""
    horizontal_flip: bool = False
    """Training only, like all that follow: mirrored in half of the draws."""
    brightness_frac: float = Field(default=0.0, ge=0, le=1)
    """Brightness is multiplied by a draw from 1 +- this; likewise contrast and saturation, in a drawn order."""
    contrast_frac: float = Field(default=0.0, ge=0, le=1)
    saturation_frac: float = Field(default=0.0, ge=0, le=1)
    hue_frac: float = Field(default=0.0, ge=0, le=0.5)
    """The hue is turned by a draw from +- this share of the colour circle."""
    grayscale_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of the draws that lose their colour."""
    blur_prob: float = Field(default=0.0, ge=0, le=1)
    """Share of the draws that are blurred, with a Gaussian of a sigma from `blur_sigma`."""
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """In pixels of the square: least and most."""

    @property
    def draws(self) -> bool:
        """Whether training draws anything: a generator per item costs more than laying out its tokens."""
        amounts = (self.rotate_degrees, self.shift_frac, self.horizontal_flip, self.grayscale_prob, self.blur_prob)
        colours = (self.brightness_frac, self.contrast_frac, self.saturation_frac, self.hue_frac)
        return self.resize == "random_resized_crop" or any(amounts) or any(colours)

    @field_validator("blur_sigma")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"expected the smaller sigma first, got {value}")
        return value


class AudioConfig(Leaf):
    """Decoding and augmentation of audio."""

    sample_rate: int = Field(default=16_000, ge=1000)
    """All audio is mixed to mono and resampled to this, in Hz."""
    max_seconds: float = Field(default=30.0, gt=0)
    long_clips: Literal["drop", "crop"] = "drop"
    """A clip longer than max_seconds: quarantined, or cropped to it, at a random place in training and to its beginning
    in evaluation; only the crop is read and decoded where the format can seek."""
    mel: Literal["device", "worker"] = "device"
    """Where log-mel is computed: batched on the model's device, or clip by clip in the loader's workers."""
    speed_frac: float = Field(default=0.0, ge=0, le=0.5)
    """Training only: playback speed drawn from 1 +- this; the clip keeps its indexed length (padded or trimmed)."""
    gain_db: float = Field(default=0.0, ge=0, le=40)
    """Training only: gain drawn from +-this."""
    noise_db: float | None = Field(default=None, le=0)
    """Training only: white noise at most this loud relative to the clip, drawn from 40 dB below it; null: none."""

    @property
    def jitters(self) -> bool:
        """Whether training changes waveforms."""
        return bool(self.speed_frac or self.gain_db) or self.noise_db is not None

    @property
    def draws(self) -> bool:
        """Whether training draws anything: changes, or the place of a crop."""
        return self.jitters or self.long_clips == "crop"


class TextConfig(Leaf):
    """Caps and normalisation of text."""

    max_chars: int = Field(default=20_000, ge=1)
    """Longer texts are quarantined; for a document or a chat this bounds all its texts together."""
    strip: bool = True
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation form."""
    collapse_spaces: bool = False
    """Runs of white space become one space."""


class TargetConfig(Leaf):
    """A label or number of each sample, read from its json member."""

    key: str = Field(min_length=1)
    """Dotted path in the json member."""
    kind: Literal["class", "classes", "number"] = "class"
    """One class, several (a list), or a finite number."""
    names: tuple[str, ...] = ()
    """Class names in the order of their numbers; empty: the json holds the numbers."""
    num_classes: int | None = Field(default=None, ge=1, le=2**24)

    @model_validator(mode="after")
    def _classes_are_counted(self):
        if self.kind == "number":
            if self.names or self.num_classes is not None:
                raise ValueError("a target of kind number has no classes; leave names and num_classes out")
        elif bool(self.names) == (self.num_classes is not None):
            raise ValueError(f"a target of kind {self.kind} needs either names or num_classes")
        return self

    @property
    def size(self) -> int:
        """Columns in the batch: classes for `classes`, else 1."""
        return len(self.names) or self.num_classes or 1


class SamplesConfig(Leaf):
    """What the model sees of each field."""

    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    text: TextConfig = TextConfig()
    targets: dict[str, TargetConfig] = Field(default_factory=dict)
    """Labels and numbers by name, for objectives that classify or regress. A sample without the value has no target."""
