"""Config of an evaluation suite: which data, which metrics."""

from typing import Literal

from pydantic import Field

from trichord.core.leaf import Leaf
from trichord.objectives.config import Pair
from trichord.shards.config import SourceConfig


class SuiteTask(Leaf):
    """One metric family on one source."""

    kind: Literal["loss", "retrieval", "caption"]
    source: str
    """Name of a source of the suite."""
    pair: Pair | None = None
    """retrieval: which towers, query first."""
    context: Literal["image", "audio"] | None = None
    """caption: what the model is given."""
    held_out: bool = False
    """True only if no sample of the source was trained on, in any augmentation."""
    note: str = ""
    max_new_tokens: int = Field(default=32, ge=1)
    batch_samples: int = Field(default=64, ge=1)


class SuiteConfig(Leaf):
    """A list of tasks over named sources, read from `configs/suites/*.yaml`."""

    name: str
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)
