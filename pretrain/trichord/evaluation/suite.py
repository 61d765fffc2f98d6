"""A suite: named tasks over named sources, each metric beside its chance level and whether the data was held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trichord.batches.config import BatchesConfig
from trichord.batches.sequential import SequentialBatch, iter_source
from trichord.batches.tokenizer import TextTokenizer
from trichord.batches.windows import ItemLengths
from trichord.core.errors import ConfigError
from trichord.core.phase import set_phase
from trichord.evaluation.caption import caption_source, normalise
from trichord.evaluation.choice import Choose, captions_chosen
from trichord.evaluation.config import SuiteConfig, SuiteTask
from trichord.evaluation.embeddings import Embedded, embed_batches, join
from trichord.evaluation.loss import next_token_sums
from trichord.evaluation.retrieval import majority_share, recall_at_k
from trichord.fusion.hf import TrichordForConditionalGeneration
from trichord.fusion.model import Trichord
from trichord.objectives.contrastive import pair_modalities
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig, SourceConfig

RECALL_AT = (1, 5)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model on its device (and the same with `generate`), and how its data is prepared.

    model: called as a `Trichord` is. rank, world_size: of the ranks that share the work; each calls the model equally
    often. together: the items of all ranks in rank order, on every rank. choose: judges captions instead of
    `generator`, see `evaluation.choice`.
    """

    model: Trichord | Callable[..., Any]
    generator: TrichordForConditionalGeneration | None
    tokenizer: TextTokenizer
    shards: ShardsConfig
    samples: SamplesConfig
    batches: BatchesConfig
    lengths: ItemLengths
    device: torch.device
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    together: Callable[[list[Any]], list[Any]] = list
    choose: Choose | None = None

    def read(self, source: SourceConfig, task: SuiteTask) -> Iterator[SequentialBatch]:
        """This rank's batches: number b of the source is on rank b % world_size."""
        lengths = self.lengths
        if self.choose is not None and task.kind == "caption":  # the model sees the context alone
            lengths = replace(lengths, **{"audio" if task.context == "image" else "image": None})
        batches = iter_source(
            source,
            self.shards,
            self.samples,
            self.batches,
            lengths=lengths,
            tokenizer=self.tokenizer,
            batch_samples=task.batch_samples,
            augment_seed=self.seed if task.augment else None,
            rank=self.rank,
            world_size=self.world_size,
        )
        for number, batch in enumerate(batches):
            set_phase("evaluate", task=task.kind, source=source.name, batch=number)
            yield batch

    def embed(self, source: SourceConfig, task: SuiteTask, modalities: tuple[str, ...]) -> dict[str, Embedded]:
        """Of the whole source, in its order, on every rank."""
        own = embed_batches(self.model, self.read(source, task), self.device, modalities)
        places = range(self.rank, self.rank + len(own) * self.world_size, self.world_size)
        found = sorted(self.together(list(zip(places, own))), key=lambda item: item[0])
        return join([parts for _, parts in found])


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


def suite_metrics(suite: SuiteConfig) -> Iterator[str]:
    """The names that `run_suite` gives."""
    for task in suite.tasks:
        names = {
            "loss": ["loss/next_token"],
            "retrieval": [f"retrieval/{task.pair}/R@{k}" for k in RECALL_AT],
            "caption": [f"caption/{task.context}/exact_match"],
        }
        yield from (f"{name} ({task.source})" for name in names[task.kind])


Row = tuple[str, float, float | None, int]


def _loss(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    own = next_token_sums(subject.model, subject.read(sources[task.source], task), subject.device)
    totals, counts = zip(*subject.together([own]))
    labels = sum(counts)
    value = math.fsum(totals) / labels if labels else math.nan
    uniform = float(torch.log(torch.tensor(float(subject.tokenizer.vocab_size))))
    yield "loss/next_token", value, uniform, labels


def _retrieval(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    assert task.pair is not None
    query, target = pair_modalities(task.pair)
    found = subject.embed(sources[task.source], task, (query, target))
    if task.gallery is not None:
        plain = task.model_copy(update={"augment": False})
        gallery = subject.embed(sources[task.gallery], plain, (target,))
        found = {query: found[query], target: gallery[target]}
    for k in RECALL_AT:
        recall = recall_at_k(found[query].embeds, found[target].embeds, found[query].groups, found[target].groups, k)
        yield f"retrieval/{query}-{target}/R@{k}", recall.value, recall.chance, recall.queries


def _caption(subject: Subject, sources: dict[str, SourceConfig], task: SuiteTask) -> Iterator[Row]:
    assert task.context is not None
    batches = subject.read(sources[task.source], task)
    if subject.choose is not None:
        own = [(right, normalise(text)) for right, text in captions_chosen(subject.choose, batches, subject.device)]
    else:
        assert subject.generator is not None
        pairs = caption_source(subject.generator, subject.tokenizer, batches, task.context, task.max_new_tokens)
        own = [(generated == wanted, wanted) for generated, wanted in pairs]
    judged = subject.together(own)
    value = sum(right for right, _ in judged) / len(judged) if judged else math.nan
    yield f"caption/{task.context}/exact_match", value, majority_share([wanted for _, wanted in judged]), len(judged)


def check_fits(suite: SuiteConfig, model: Trichord) -> None:
    """Raise unless the model has what the tasks need, before anything is read.

    Raises:
        ConfigError: a task needs a language model, a head or a tower that the model lacks.
    """
    for task in suite.tasks:
        where = f"suite {suite.name!r}, the {task.kind} task on {task.source!r}"
        if task.kind != "retrieval":
            if model.trunk is None:
                raise ConfigError(f"{where} needs a language model, and this model has no trunk")
            tower = {"image": model.vision, "audio": model.audio}.get(task.context or "", model)
            if tower is None:
                raise ConfigError(f"{where} gives the model {task.context}, and this model has no tower for it")
            continue
        assert task.pair is not None
        missing = [name for name in pair_modalities(task.pair) if name not in model.heads]
        if missing:
            raise ConfigError(f"{where} needs embeddings of {' and '.join(missing)}, and this model learns none")
