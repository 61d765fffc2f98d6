"""Config of the checkpoints room: when to save, what to keep, and where else to keep it."""

import re
from typing import Literal

from pydantic import Field, field_validator

from trichord.core.leaf import Leaf


class KeepBest(Leaf):
    """Keep the checkpoints with the best values of one metric, however old."""

    metric: str = Field(min_length=1)
    """Name as in metrics.jsonl, such as `train/loss`, or as in an evaluation's table,
    `retrieval/image-text/R@1 (scans-heldout)`. A checkpoint has the newest value at the time of its save."""
    mode: Literal["min", "max"] = "min"
    count: int = Field(default=1, ge=1)

    @field_validator("metric")
    @classmethod
    def _as_logged(cls, name: str) -> str:
        shown = re.fullmatch(r"(\S+) \(([^()]+)\)", name.strip())
        return (f"eval/{shown[2]}/{shown[1]}" if shown else name.strip()).replace("@", "_at_")


class CheckpointsConfig(Leaf):
    """Saving. A checkpoint counts only once its manifest is written."""

    save_every_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints whose step is a multiple of this are never removed."""
    keep_best: KeepBest | None = None
    mirror: str | None = None
    """Copies of the checkpoints elsewhere: `s3://bucket/prefix`, `gs://...`, any fsspec URL or a path. They go below
    `MIRROR/RUN` in the background, under the same rules of what is kept, and a run goes on from there where its own
    folder has none, or older ones."""
    mirror_wait_s: float = Field(default=300.0, ge=0)
    """At the end of a run: how long to wait for the copy of the last checkpoint."""
    commit_timeout_s: float = Field(default=600.0, gt=0)
    """A save whose ranks are not all done after this long is abandoned; the previous checkpoint stays."""

    @field_validator("mirror")
    @classmethod
    def _mirror_is_a_place(cls, mirror: str | None) -> str | None:
        if mirror is not None and not mirror.strip():
            raise ValueError("is blank; expected a place such as s3://bucket/prefix or a path, or null for no copies")
        return mirror.strip() if mirror is not None else None
