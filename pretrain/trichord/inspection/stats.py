"""`trichord data stats`: how much there is of what, source by source, in one pass over the shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from trichord.batches.tokenizer import load_tokenizer
from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.inspection.collect import Figures, Label, Wishes, collect
from trichord.inspection.exclusions import ExcludeLists
from trichord.inspection.judge import SampleRange, prepare, ranges
from trichord.inspection.processes import Processes
from trichord.inspection.repeats import Repeats
from trichord.inspection.target import Target
from trichord.inspection.walk import ShardFacts, walk_shard
from trichord.samples.unread import scattered, sentences, unmapped
from trichord.shards.index import load_index
from trichord.shards.sources import expand_shards
from trichord.tracking.progress import work_progress

_log = get_logger(__name__)
_KEYS_SHOWN = 20
STATS_VERSION = 1
SAMPLED_TEXTS = 5000
"""Texts that are tokenised, per source, unless all are asked for."""


@dataclass
class SourceStats:
    """Figures of one source. duplicates: samples whose main member an earlier sample of any source has too."""

    name: str
    weight: float
    shards: list[ShardFacts] = field(default_factory=list)
    figures: Figures = field(default_factory=Figures)
    duplicates: int = 0

    @property
    def members(self) -> dict[str, dict[str, int]]:
        """Count and bytes by extension, most bytes first; of everything in the shards."""
        count, size = Counter(), Counter()
        for shard in self.shards:
            count.update(shard.members)
            size.update(shard.member_bytes)
        return {ext: {"count": count[ext], "bytes": total} for ext, total in size.most_common()}

    def to_json(self) -> dict[str, Any]:
        figures = self.figures
        return {
            "name": self.name,
            "weight": self.weight,
            "shards": len(self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            "samples": figures.samples,
            "bad_by_index": figures.bad,
            "filtered": dict(figures.filtered),
            "duplicates": self.duplicates,
            "members": self.members,
            "audio_rates": {str(rate): count for rate, count in sorted(figures.rates.items())},
            "labels": {key: label_json(label) for key, label in figures.labels.items()},
            **{name: spread.to_json() for name, spread in figures.spread.items()},
        }


@dataclass
class Stats:
    """All sources. tokens_of: "all", "sample" or "none": what text_tokens and sample_tokens were counted over."""

    sources: list[SourceStats]
    tokens_of: str
    hashed: bool
    warnings: list[dict[str, str]] = field(default_factory=list)

    @property
    def total(self) -> Figures:
        total = Figures()
        for source in self.sources:
            total.merge(source.figures)
        return total

    def to_json(self) -> dict[str, Any]:
        """See docs/data/inspect.md for the fields."""
        everything = SourceStats("total", 1.0, [s for source in self.sources for s in source.shards], self.total)
        everything.duplicates = sum(source.duplicates for source in self.sources)
        total = everything.to_json()
        del total["name"], total["weight"]
        return {
            "version": STATS_VERSION,
            "tokens_of": self.tokens_of,
            "duplicates_of": "all" if self.hashed else "none",
            "warnings": self.warnings,
            "total": total,
            "sources": [source.to_json() for source in self.sources],
        }


def gather_stats(
    target: Target, wishes: Wishes, *, every_text: bool = False, workers: int = 1, duplicates: Path | None = None
) -> Stats:
    """One pass over all sources. `duplicates` gets a line for every sample whose content an earlier one has.

    Raises:
        ConfigError: the tokenizer or the model cannot be had, or a file cannot be written.
        DataError: a shard cannot be read, a source has no samples, or a process died.
    """
    lists = ExcludeLists(target.shards.sources)  # what a user may have misspelt is told before anything is indexed
    if wishes.tokenizer is not None:
        load_tokenizer(wishes.tokenizer)
    with ExitStack() as stack:
        lines = None if duplicates is None else stack.enter_context(_opened(duplicates))
        repeats = stack.enter_context(Repeats())
        prepare(target)
        processes = stack.enter_context(Processes(workers, target.shards.storage))
        sources = [_walk(target, number, processes, lists) for number in range(len(target.shards.sources))]
        shards = [facts.url for source in sources for facts in source.shards]
        jobs = list(_jobs(target, sources, wishes, every_text))
        numbers = {place: shard for shard, place in enumerate(_places(sources))}
        with work_progress("samples", sum(place.stop - place.start for place, _ in jobs)) as advance:
            for (place, _), figures in processes.run(collect, jobs):
                sources[place.source].figures.merge(figures)
                if figures.hashed:
                    number = numbers[place.source, place.shard]
                    repeats.add(figures.hashes, number, np.array(figures.hashed))
                advance(place.stop - place.start)
        _find_duplicates(repeats, sources, shards, lines)
    known = target.config is not None or wishes.tokenizer is not None
    sampled = any(wish.text_frac < 1 for _, wish in jobs)
    warnings = [*_warnings(sources, target), *lists.warnings(), *_absent_labels(sources)]
    for name, text in warnings:
        _log.warning("%s: %s", name, text)
    told = [{"source": name, "warning": text} for name, text in warnings]
    return Stats(sources, ("sample" if sampled else "all") if known else "none", wishes.hashes, told)


def _warnings(sources: list[SourceStats], target: Target) -> Iterator[tuple[str, str]]:
    """(source, sentence) about what the headers show to be hardly meant so; see `trichord data lint` for all of it."""
    for source, config in zip(sources, target.shards.sources):
        returning = sum(facts.returning for facts in source.shards)
        if returning:
            yield (
                source.name,
                scattered(returning, [key for facts in source.shards for key in facts.returning_examples][:3]),
            )
        members = {ext: count["count"] for ext, count in source.members.items()}
        yield from ((source.name, text) for text in sentences(unmapped(members, config.fields)))


def _absent_labels(sources: list[SourceStats]) -> Iterator[tuple[str, str]]:
    """(label, sentence) for each one that no sample has."""
    total = Stats(sources, "none", False).total
    for key, label in total.labels.items():
        if label.absent:
            keys = ", ".join(f"{name} ({count})" for name, count in total.json_keys.most_common(_KEYS_SHOWN))
            there = f"their json members have the keys {keys}" if keys else "none of them has a json member with keys"
            yield f"label {key}", f"no sample of {total.samples} has it; {there}"


def _opened(file: Path) -> IO[str]:
    try:
        return file.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--duplicates {file}: cannot be written: {error.strerror}") from error


def _walk(target: Target, number: int, processes: Processes, lists: ExcludeLists) -> SourceStats:
    config = target.shards.sources[number]
    source = SourceStats(config.name, config.weight)
    urls = expand_shards(config)
    with work_progress(f"{config.name}: shards", len(urls)) as advance:
        for _, facts in processes.run(walk_shard, [(url, config.fields) for url in urls]):
            if facts.problem is not None:
                raise DataError(f"{facts.problem}; `trichord data lint` lists all that is wrong")
            lists.look(config.name, facts.url, facts.key_hashes)
            facts.key_hashes = b""
            source.shards.append(facts)
            advance(1)
    if not any(facts.samples for facts in source.shards):
        raise DataError(f"source {config.name!r} has no samples in {len(urls)} shards; see `trichord data lint`")
    return source


def _jobs(
    target: Target, sources: list[SourceStats], wishes: Wishes, every_text: bool
) -> Iterator[tuple[SampleRange, Wishes]]:
    for number, source in enumerate(sources):
        samples = sum(facts.samples for facts in source.shards)
        frac = 1.0 if every_text else min(1.0, SAMPLED_TEXTS / max(1, samples))
        for facts in source.shards:
            for place in ranges(target, number, facts.url, facts.samples):
                yield place, replace(wishes, text_frac=frac)


def _places(sources: list[SourceStats]) -> list[tuple[int, str]]:
    return [(number, facts.url) for number, source in enumerate(sources) for facts in source.shards]


def _find_duplicates(repeats: Repeats, sources: list[SourceStats], shards: list[str], lines: IO[str] | None) -> None:
    """The first of equal samples, in the order of sources and shards, stays; all others are its duplicates."""
    owners = [number for number, _ in _places(sources)]
    for group in repeats.groups():
        for shard, _ in group[1:]:
            sources[owners[shard]].duplicates += 1
        if lines is not None:
            first, *others = [(shard, load_index(shards[shard]).entry(sample).key) for shard, sample in group]
            for shard, key in others:
                line = {"shard": shards[shard], "key": key, "source": sources[owners[shard]].name}
                original = {"shard": shards[first[0]], "key": first[1], "source": sources[owners[first[0]]].name}
                lines.write(json.dumps({**line, "duplicate_of": original}) + "\n")


def label_json(label: Label) -> dict[str, Any]:
    """classes: name -> count, most frequent first."""
    numbers = {"numbers": label.numbers.to_json()} if label.numbers.count else {}
    return {"classes": dict(label.classes.most_common()), "missing": label.missing, "other": label.other, **numbers}
