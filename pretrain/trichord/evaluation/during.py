"""A suite on the model that is being trained: on all ranks together, and without a trace in the training.

What evaluation could change is put back: the random states of this process, the modules' train or eval mode, and the
weights where their average is evaluated. Batches go through the engine as those of training do, so that ZeRO-3 gathers
what it must; every rank calls it equally often (`batches.sequential`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trichord.batches.packed_batch import PackedBatch
from trichord.batches.tokenizer import TextTokenizer
from trichord.checkpoints.state import refresh_parameters
from trichord.core.errors import ConfigError
from trichord.engine.masters import masters
from trichord.evaluation.choice import likeliest
from trichord.evaluation.config import SuiteConfig
from trichord.evaluation.suite import suite_metrics
from trichord.fusion.model import ModelOutput


class EngineModel:
    """An engine in the place of its model: called as a `Trichord` is, and asked for the likeliest tokens."""

    def __init__(self, engine: Any, tokenizer: TextTokenizer):
        self._engine = engine
        self._vocab_size = tokenizer.vocab_size
        special = tokenizer.special_ids
        self._never = {special[name] for name in ("image_id", "audio_id", "pad_id", "bos_id")} - {special["eos_id"]}

    def __call__(self, batch: PackedBatch, towers_only: bool = False) -> Any:
        """The fields of `ModelOutput`."""
        output = self._engine(batch, towers_only=towers_only)
        return SimpleNamespace(**{field.name: output.get(field.name) for field in fields(ModelOutput)})

    def choose(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """positions (K,) -> the likeliest next token (K,) int64 at each, on the CPU."""
        return likeliest(self._engine(batch, logits_at=positions)["logits"], self._vocab_size, self._never)


@contextmanager
def set_aside(engine: Any, average: bool = False) -> Iterator[None]:
    """In here the model is in eval mode and learns nothing; afterwards all is as it was, bit for bit.

    average: with the average of the weights, see `engine.ema`. All ranks enter together.
    """
    modes = [(module, module.training) for module in engine.modules()]
    numbers, arrays = random.getstate(), np.random.get_state()
    engine.eval()
    try:
        with torch.random.fork_rng(), torch.no_grad(), _averaged(engine) if average else nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(numbers)
        np.random.set_state(arrays)


@contextmanager
def _averaged(engine: Any) -> Iterator[None]:
    """The average in the masters' place, and so in the parameters that the model computes with."""
    live = masters(engine)
    kept = [master.detach().clone() for master in live]
    try:
        _fill(engine, live, engine.weight_average.tensors)
        yield
    finally:
        _fill(engine, live, kept)


def _fill(engine: Any, live: list[Tensor], values: list[Tensor]) -> None:
    for master, value in zip(live, values, strict=True):
        master.detach().copy_(value)
    refresh_parameters(engine)


def require_known_metric(name: str, suite: SuiteConfig | None) -> None:
    """For a name that chooses checkpoints: an `eval/...` must be one that the run's suite gives.

    Raises:
        ConfigError: it gives no such metric, or the run has no suite.
    """
    if not name.startswith("eval/") or name == "eval/time_s":
        return
    if suite is None:
        raise ConfigError(f"checkpoints.keep_best.metric is {name}, and this run evaluates nothing; set evaluation")
    known = metric_names({shown: {"value": 0.0} for shown in suite_metrics(suite)})
    if name not in known:
        raise ConfigError(
            f"checkpoints.keep_best.metric is {name}, which suite {suite.name!r} does not give; it gives "
            f"{', '.join(sorted(known))}"
        )


def metric_names(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What `run_suite` found, as metrics: `caption/image/exact_match (it)` is `eval/it/caption/image/exact_match`."""
    found = {}
    for name, facts in results.items():
        metric, _, source = name.rpartition(" (")
        plain = re.sub(r"[^A-Za-z0-9_./-]", "_", metric.replace("@", "_at_"))
        found[f"eval/{source.rstrip(')')}/{plain}"] = float(facts["value"])
    return found
