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


class TrackingConfig(Leaf):
    """What is logged, how often, and where to."""

    log_every_steps: int = Field(default=10, ge=1)
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one GPU computes at best, in TFLOP/s, for MFU; null: from a table by the GPU's name, and no MFU on a CPU."""
    wandb: WandbConfig = WandbConfig()
