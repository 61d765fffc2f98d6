"""Config of an evaluation suite: which data, which metrics; and of evaluation during training."""

from typing import Literal

from pydantic import Field, model_validator

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
    gallery: str | None = None
    """retrieval: source of the targets; null: the same source. Targets with the query's group count as right."""
    context: Literal["image", "audio"] | None = None
    """caption: what the model is given."""
    augment: bool = False
    """Augment the samples as in training, with other draws."""
    held_out: bool = False
    """True only if no sample of the source was trained on, in any augmentation."""
    note: str = ""
    max_new_tokens: int = Field(default=32, ge=1)
    batch_samples: int = Field(default=64, ge=1)


class EvaluationConfig(Leaf):
    """A suite that runs while the model learns; its figures are metrics `eval/...` of the run."""

    suite: str
    """Suite file, or the name of a shipped one, as `trichord evaluate` takes it."""
    every_steps: int = Field(ge=1)
    ema: bool = False
    """Evaluate the average of the weights (`engine.ema_decay`) instead of the weights."""


class SuiteConfig(Leaf):
    """A list of tasks over named sources, read from `configs/suites/*.yaml`."""

    name: str
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    tasks: tuple[SuiteTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _tasks_are_whole(self):
        names = {source.name for source in self.sources}
        for task in self.tasks:
            for key, source in (("source", task.source), ("gallery", task.gallery)):
                if source is not None and source not in names:
                    raise ValueError(f"task {key} {source!r} is none of the suite's sources {sorted(names)}")
            if task.kind == "retrieval" and task.pair is None:
                raise ValueError(f"a retrieval task needs a pair (on source {task.source!r})")
            if task.kind == "caption" and task.context is None:
                raise ValueError(f"a caption task needs a context, image or audio (on source {task.source!r})")
        return self
