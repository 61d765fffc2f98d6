"""Config of the shards room: which tars feed the run, and how they are mixed."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trichord.core.leaf import Leaf

Modality = Literal["image", "audio", "text"]


class FieldsConfig(Leaf):
    """Which file extensions of a sample are which field. The first extension present wins."""

    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    audio: tuple[str, ...] = ("flac", "wav", "mp3", "ogg", "opus")
    text: tuple[str, ...] = ("txt",)
    meta: tuple[str, ...] = ("json",)

    @field_validator("image", "audio", "text", "meta")
    @classmethod
    def _no_executable_extension(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        refused = {"pyd", "pkl", "pickle", "pth", "pt"} & {e.lower() for e in extensions}
        if refused:
            raise ValueError(f"{sorted(refused)} hold pickled code and are never read; map a data format instead")
        return extensions


class SourceConfig(Leaf):
    """A weighted set of shards."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    shards: tuple[str, ...] = Field(min_length=1)
    """Paths, globs (`data/*.tar`), brace ranges (`data/{0000..0099}.tar`) or fsspec URLs of tar files."""
    fields: FieldsConfig = FieldsConfig()
    weight: float = Field(default=1.0, gt=0)
    """Share of draws, relative to the other sources."""
    epochs: int | None = Field(default=None, ge=1)
    """How often the source may be read through; null: for ever."""
    require: tuple[Modality, ...] = ()
    """Fields every sample must have; a sample lacking one is quarantined."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        return (value,) if isinstance(value, str) else value

    @field_validator("shards")
    @classmethod
    def _no_pipe(cls, shards: tuple[str, ...]) -> tuple[str, ...]:
        for shard in shards:
            if shard.startswith("pipe:"):
                raise ValueError(f"{shard!r}: 'pipe:' runs a shell command and is refused; use a path or an fsspec URL")
        return shards


class ShardsConfig(Leaf):
    """All sources of the run, the shuffle window, and how much bad data is tolerated."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    window_samples: int = Field(default=256, ge=1)
    """Consecutive references of a lane that are permuted and packed together."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    min_samples_for_bad_fraction: int = Field(default=1000, ge=1)
    max_member_bytes: int = Field(default=64 * 2**20, ge=1)
    max_members_per_sample: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _unique_names(self):
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ, got {names}")
        return self
