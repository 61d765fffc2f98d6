"""Config of the shards room: which tars feed the run, and how they are mixed."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from trichord.core.leaf import Leaf
from trichord.shards.formats import refusal

Modality = Literal["image", "audio", "text"]


class FieldsConfig(Leaf):
    """Which file extensions of a sample are which field. The first extension present wins."""

    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    audio: tuple[str, ...] = ("flac", "wav", "mp3", "ogg", "opus")
    text: tuple[str, ...] = ("txt",)
    meta: tuple[str, ...] = ("json",)

    @field_validator("image", "audio", "text", "meta", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        """A string is a list of one; webdataset writes several as `jpg;jpeg`."""
        return tuple(value.split(";")) if isinstance(value, str) else value

    @field_validator("image", "audio", "text", "meta")
    @classmethod
    def _can_match(cls, extensions: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for reason in filter(None, (refusal(info.field_name or "", ext) for ext in extensions)):
            raise ValueError(reason)
        return extensions

    @field_validator("image", "audio", "text", "meta")
    @classmethod
    def _no_executable_extension(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        refused = {"pyd", "pkl", "pickle", "pth", "pt"} & {e.lower() for e in extensions}
        if refused:
            raise ValueError(f"{sorted(refused)} hold pickled code and are never read; map a data format instead")
        return extensions


class MetaFilter(Leaf):
    """Keep samples by one value of their json member."""

    key: str = Field(min_length=1)
    """Dotted path: `similarity`, `licence.id`."""
    min: float | None = None
    max: float | None = None
    one_of: tuple[str | int | bool, ...] = ()
    none_of: tuple[str | int | bool, ...] = ()
    missing: Literal["drop", "keep"] = "drop"
    """What becomes of a sample that has no such value."""

    @model_validator(mode="after")
    def _says_something(self):
        if self.min is None and self.max is None and not self.one_of and not self.none_of:
            raise ValueError(f"filter on {self.key!r} keeps everything; give min, max, one_of or none_of")
        return self


class FiltersConfig(Leaf):
    """Which samples of a source are read. What a filter leaves out is counted by reason and is not bad data."""

    meta: tuple[MetaFilter, ...] = ()
    min_image_side: int | None = Field(default=None, ge=1)
    """Shorter side, in pixels."""
    max_image_aspect: float | None = Field(default=None, ge=1)
    """Longer side over shorter side."""
    min_audio_seconds: float | None = Field(default=None, ge=0)
    max_audio_seconds: float | None = Field(default=None, gt=0)
    min_text_chars: int | None = Field(default=None, ge=0)
    max_text_chars: int | None = Field(default=None, ge=1)
    exclude: tuple[str, ...] = ()
    """JSON-lines files whose lines name a `shard` (its base name counts) and a `key`: a run's quarantine.jsonl, what
    `trichord data lint` and `trichord data stats --duplicates` write."""

    @model_validator(mode="after")
    def _ranges_hold_something(self):
        for name in ("audio_seconds", "text_chars"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{name} {least:g} is above max_{name} {most:g}, so no sample would be left")
        return self


class SourceConfig(Leaf):
    """A weighted set of shards."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    shards: tuple[str, ...] = Field(min_length=1)
    """Paths, globs (`data/*.tar`), brace ranges (`data/{0000..0099}.tar`) or fsspec URLs of tar files (.tar, .tar.gz,
    .tgz), or a `.txt` file that lists such, one per line."""
    fields: FieldsConfig = FieldsConfig()
    weight: float = Field(default=1.0, gt=0)
    """Share of draws (or tokens, see `shards.weights_by`), relative to the others of its group."""
    weight_schedule: tuple[tuple[int, float], ...] = ()
    """(step, weight) pairs, steps ascending: from each step on, that weight; before the first, `weight`."""
    loss_weight: float = Field(default=1.0, ge=1e-6, le=1e6)
    """How much each of its labels counts in the next-token loss, a mean by weight. Training only; the order of samples
    does not change."""
    group: str = Field(default="", pattern=r"^([A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*)?$")
    """Path of the group it belongs to, such as `speech/english`; empty: none. See `shards.group_weights`."""
    epochs: int | None = Field(default=None, ge=1)
    """How often the source may be read through; null: for ever. A run ends when all sources are used up."""
    require: tuple[Modality, ...] = ()
    """Fields every sample must have; a sample lacking one is quarantined."""
    filters: FiltersConfig = FiltersConfig()
    follow: bool = False
    """Look for new shards at each epoch of the source; each epoch's list of shards is recorded in the run folder."""

    @field_validator("weight_schedule")
    @classmethod
    def _ascending(cls, schedule: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        steps = [step for step, _ in schedule]
        if steps != sorted(set(steps)) or any(step < 0 for step in steps):
            raise ValueError(f"steps must ascend from 0 or more, got {steps}")
        if any(not weight > 0 for _, weight in schedule):
            raise ValueError("weights must be positive; end a source with `epochs`")
        return schedule

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


class StorageConfig(Leaf):
    """Reading shards that are not on this machine's disks (s3, gs, http, hf): blocks, cache, patience."""

    cache_dir: str | None = None
    """Where fetched blocks and unpacked tar.gz are kept; null: $TRICHORD_CACHE, else ~/.cache/trichord."""
    cache_gib: float = Field(default=20.0, gt=0)
    """Bound of the cache on this disk; the least recently read goes first. Shared by all processes of the machine."""
    block_mib: float = Field(default=4.0, gt=0)
    """Bytes fetched by one range request."""
    read_ahead_blocks: int = Field(default=2, ge=0)
    timeout_s: float = Field(default=30.0, gt=0)
    """Per request; a stalled one is given up and tried again."""
    attempts: int = Field(default=6, ge=1)


class ShardsConfig(Leaf):
    """All sources of the run, the shuffle window, and how much bad data is tolerated."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    group_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each group by its path, relative to the sources and groups beside it. A group keeps its share as long
    as one source in it lasts: what runs out inside a group is made up for inside it."""
    weights_by: Literal["samples", "tokens"] = "samples"
    """What the weights share out: draws, or tokens (by the mean length of the source's first samples)."""
    storage: StorageConfig = StorageConfig()
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

    @model_validator(mode="after")
    def _groups_have_weights(self):
        parts = [source.group.split("/") for source in self.sources if source.group]
        named = {"/".join(path[:depth]) for path in parts for depth in range(1, len(path) + 1)}
        if named != set(self.group_weights):
            raise ValueError(
                f"group_weights must name the groups of the sources, {sorted(named)}; got {sorted(self.group_weights)}"
            )
        if any(not weight > 0 for weight in self.group_weights.values()):
            raise ValueError(f"group weights must be positive, got {self.group_weights}")
        return self
