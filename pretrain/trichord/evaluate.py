"""The stories of evaluation: a checkpoint and a suite give a table of metrics; a run looks at itself on its way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import StepBatch
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.tokenizer import TextTokenizer
from trichord.config.identity import RunFolder
from trichord.config.load import load_suite
from trichord.config.run import RunConfig
from trichord.core.log import get_logger
from trichord.engine.together import gather_lists
from trichord.evaluation.config import SuiteConfig
from trichord.evaluation.during import EngineModel, metric_names, require_known_metric, set_aside
from trichord.evaluation.suite import Subject, check_fits, run_suite
from trichord.journal import Recording
from trichord.restore import item_lengths, restore, with_generate
from trichord.shards.config import SourceConfig
from trichord.tracking.previews import MAX_SAMPLES, PreviewsWriter
from trichord.tracking.recorder import Recorder
from trichord.tracking.sample_view import SampleView, label_positions, pick_segments, view_samples

log = get_logger(__name__)
MAX_PREVIEW_PASSES = 4


def evaluate(path: Path, suite: str, shards: dict[str, str] | None = None, ema: bool = False) -> dict[str, Any]:
    """Metrics of the newest checkpoint of a run folder, or of one checkpoint folder.

    shards: source name -> shards to read instead of the suite's; ema: take the average of the weights.

    Returns:
        {"checkpoint", "step", "suite", "metrics": see `evaluation.suite.run_suite`}.
    """
    loaded = load_suite(suite)
    if shards:
        sources = tuple(
            source.model_copy(update={"shards": (shards[source.name],)}) if source.name in shards else source
            for source in loaded.sources
        )
        loaded = loaded.model_copy(update={"sources": sources})
    restored = restore(path, ema)
    config = restored.config
    check_fits(loaded, restored.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = Subject(
        restored.model.to(device),
        with_generate(restored),
        restored.tokenizer,
        config.shards,
        config.samples,
        config.batches,
        item_lengths(config),
        device,
        seed=config.run.seed + 1,
    )
    metrics = run_suite(subject, loaded, log.info)
    return {"checkpoint": str(restored.folder), "step": restored.step, "suite": loaded.name, "metrics": metrics}


class OnTheWay:
    """What a run looks at while it trains: a suite every `evaluation.every_steps`, samples every
    `tracking.preview_every_steps`. Every rank has one."""

    def __init__(
        self,
        config: RunConfig,
        engine: Any,
        tokenizer: TextTokenizer,
        device: torch.device,
        recorder: Recorder,
        recording: Recording,
        folder: RunFolder,
    ):
        """Raises ConfigError: the suite does not fit the model, or lacks the metric that chooses checkpoints."""
        self.config, self.engine, self.recorder, self.recording = config, engine, recorder, recording
        self.model = EngineModel(engine, tokenizer)
        self.tokenizer, self.device = tokenizer, device
        names = [source.name for source in config.shards.sources]
        self.previews = PreviewsWriter(folder.path, names, config.samples.audio.sample_rate, folder.attempt)
        wanted = config.evaluation
        self.suite: SuiteConfig | None = load_suite(wanted.suite) if wanted is not None else None
        if config.checkpoints.keep_best is not None:
            require_known_metric(config.checkpoints.keep_best.metric, self.suite)
        if self.suite is None:
            return
        check_fits(self.suite, engine.module.model)
        self.subject = Subject(
            *(self.model, None, tokenizer, config.shards, config.samples, config.batches, item_lengths(config), device),
            seed=config.run.seed + 1,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            together=gather_lists,
            choose=self.model.choose,
        )

    def after(self, step: int, batch: StepBatch, *, stopped: bool) -> None:
        """Called after each step on all ranks; a run that was told to stop looks at nothing any more."""
        wanted, every = self.config.evaluation, self.config.tracking.preview_every_steps
        if every is not None and step % every == 0 and not stopped:
            self._preview(step, batch.micro_batches[:MAX_PREVIEW_PASSES])
        if wanted is not None and step % wanted.every_steps == 0 and not stopped:
            self._evaluate(step, wanted.ema)

    def _evaluate(self, step: int, average: bool) -> None:
        assert self.suite is not None
        began = time.monotonic()
        with self.recording.aside("evaluate"), set_aside(self.engine, average):
            found = metric_names(run_suite(self.subject, self.suite))
        seconds = time.monotonic() - began
        self.recorder.metrics(step, {**found, "eval/time_s": seconds})
        self.recorder.event("evaluation", step, suite=self.suite.name, seconds=round(seconds, 2), ema=average)
        log.info("step %d, %s: %s", step, self.suite.name, ", ".join(f"{n[5:]} {v:.4g}" for n, v in found.items()))

    def _preview(self, step: int, micro_batches: Sequence[PackedBatch]) -> None:
        """Some of rank 0's samples. All ranks pass the same number of micro-batches through the model."""
        views: list[SampleView] = []
        with self.recording.aside("preview"), set_aside(self.engine):
            for batch in micro_batches:
                room = MAX_SAMPLES - len(views) if dist.get_rank() == 0 else 0
                batch = batch.unshared().to("cpu")
                segments, chosen = pick_segments(batch, room), None
                if self.engine.module.model.trunk is not None:
                    at = label_positions(batch, segments).to(self.device)
                    chosen = self.model.choose(batch.to(self.device), at)
                views += view_samples(batch, segments, chosen, self.tokenizer)
        if dist.get_rank() != 0:
            return
        try:
            self.recorder.previews(step, self.previews.write(step, views))
        except OSError as error:  # no part of the record: the run goes on without
            log.warning("the previews of step %d cannot be written: %s", step, error)


def suite_sources(config: RunConfig) -> tuple[SourceConfig, ...]:
    """The sources that evaluation during training reads. Raises ConfigError: the suite is wrong."""
    return load_suite(config.evaluation.suite).sources if config.evaluation is not None else ()
