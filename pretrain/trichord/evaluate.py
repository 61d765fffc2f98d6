"""The story of an evaluation: a checkpoint, a suite, and a table of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trichord.config.load import load_suite
from trichord.core.log import get_logger
from trichord.evaluation.suite import Subject, run_suite
from trichord.restore import item_lengths, restore, with_generate

log = get_logger(__name__)


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
