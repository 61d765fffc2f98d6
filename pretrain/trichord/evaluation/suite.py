"""A suite: named tasks over named sources, each metric beside its chance level and whether the data was held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trichord.batches.config import BatchesConfig
from trichord.batches.sequential import SequentialBatch, iter_source
from trichord.batches.tokenizer import TextTokenizer
from trichord.batches.windows import ItemLengths
from trichord.core.errors import ConfigError
from trichord.evaluation.caption import caption_source
from trichord.evaluation.config import SuiteConfig, SuiteTask
from trichord.evaluation.embeddings import embed_source
from trichord.evaluation.loss import next_token_loss
from trichord.evaluation.retrieval import majority_share, recall_at_k
from trichord.fusion.hf import TrichordForConditionalGeneration
from trichord.fusion.model import Trichord
from trichord.objectives.contrastive import pair_modalities
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig, SourceConfig

RECALL_AT = (1, 5)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model on its device (and the same with `generate`), and how its data is prepared."""

    model: Trichord
    generator: TrichordForConditionalGeneration | None
    tokenizer: TextTokenizer
    shards: ShardsConfig
    samples: SamplesConfig
    batches: BatchesConfig
    lengths: ItemLengths
    device: torch.device
    seed: int = 0

    def read(self, source: SourceConfig, task: SuiteTask) -> Iterator[SequentialBatch]:
        return iter_source(
            source,
            self.shards,
            self.samples,
            self.batches,
            lengths=self.lengths,
            tokenizer=self.tokenizer,
            batch_samples=task.batch_samples,
            augment_seed=self.seed if task.augment else None,
        )


def run_suite(subject: Subject, suite: SuiteConfig, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """All tasks of a suite.

    Returns:
        metric name -> {"value", "chance", "baseline", "held_out", "n", "note"}; baseline is None (the caller may know
        one). Names say task, what is given, and the source: `retrieval/image-text/R@1 (scans-heldout)`.
    """
    sources = {source.name: source for source in suite.sources}
    run = {"loss": _loss, "retrieval": _retrieval, "caption": _caption}
    metrics: dict[str, Any] = {}
    for task in suite.tasks:
        say(f"{task.kind} on {task.source}")
        for name, value, chance, count in run[task.kind](subject, sources, task):
            facts = {"value": value, "chance": chance, "baseline": None, "held_out": task.held_out, "n": count}
            metrics[f"{name} ({task.source})"] = {**facts, "note": task.note}
    return metrics


Row = tuple[str, float, float | None, int]


def _loss(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    value, labels = next_token_loss(subject.model, subject.read(sources[task.source], task), subject.device)
    uniform = float(torch.log(torch.tensor(float(subject.tokenizer.vocab_size))))
    yield "loss/next_token", value, uniform, labels


def _retrieval(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    assert task.pair is not None
    query, target = pair_modalities(task.pair)
    found = embed_source(subject.model, subject.read(sources[task.source], task), subject.device, (query, target))
    if task.gallery is not None:
        plain = task.model_copy(update={"augment": False})
        gallery = embed_source(subject.model, subject.read(sources[task.gallery], plain), subject.device, (target,))
        found = {query: found[query], target: gallery[target]}
    for k in RECALL_AT:
        recall = recall_at_k(found[query].embeds, found[target].embeds, found[query].groups, found[target].groups, k)
        yield f"retrieval/{query}-{target}/R@{k}", recall.value, recall.chance, recall.queries


def _caption(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    assert task.context is not None
    batches = subject.read(sources[task.source], task)
    if subject.generator is None:
        raise ConfigError(f"the caption task on {task.source!r} needs a language model, and this model has no trunk")
    pairs = caption_source(subject.generator, subject.tokenizer, batches, task.context, task.max_new_tokens)
    hits = [generated == wanted for generated, wanted in pairs]
    value = sum(hits) / len(hits) if hits else float("nan")
    yield f"caption/{task.context}/exact_match", value, majority_share([wanted for _, wanted in pairs]), len(hits)
