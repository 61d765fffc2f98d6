"""Config of the tracking room."""

from typing import Literal

from pydantic import Field

from trichord.core.leaf import Leaf


class WandbConfig(Leaf):
    """The Weights & Biases mirror; `metrics.jsonl` is always the record."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"
    """auto: online when an API key is configured, else offline."""
    project: str = "trichord"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class ProfileConfig(Leaf):
    """A window of steps under torch's profiler; a trace per rank goes to `profile/` in the run folder."""

    start_step: int = Field(default=10, ge=0)
    """Finished steps before the window; the first ones of a run are no example of the rest."""
    steps: int = Field(default=3, ge=1, le=50)
    """Length of the window. Traces are kept in memory until it ends, and each step adds megabytes to them."""


class TrackingConfig(Leaf):
    """What is logged, how often, and where to."""

    log_every_steps: int = Field(default=10, ge=1)
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one GPU computes at best, in TFLOP/s, for MFU; null: from a table by the GPU's name, and no MFU on a CPU."""
    tensorboard: bool = False
    """Write event files for TensorBoard, too, into `tensorboard/` of the run folder."""
    profile: ProfileConfig | None = None
    preview_every_steps: int | None = Field(default=None, ge=1)
    """Write some samples with what the model says of them, as texts, pictures and sounds, to `previews/` of the run
    folder, into the report and into a W&B table; null: never."""
    wandb: WandbConfig = WandbConfig()
