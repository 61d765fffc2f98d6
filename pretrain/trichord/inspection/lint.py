"""`trichord data lint`: every shard walked, every sample decoded, every fault counted."""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np

from trichord.core.errors import ConfigError, DataError
from trichord.inspection import lint_report as what
from trichord.inspection.exclusions import ExcludeLists
from trichord.inspection.judge import Judged, SampleRange, judge, prepare, ranges
from trichord.inspection.lint_report import LintReport, SourceReport
from trichord.inspection.processes import Processes
from trichord.inspection.repeats import Repeats
from trichord.inspection.target import Target
from trichord.inspection.walk import MAX_EXAMPLES, ShardFacts, walk_shard
from trichord.samples.unread import unmapped
from trichord.shards.index import load_index
from trichord.shards.sources import expand_shards
from trichord.tracking.progress import work_progress


def lint(target: Target, workers: int = 1, out: Path | None = None) -> LintReport:
    """Walk and decode everything; `out` gets a line per bad sample, as `filters.exclude` takes them.

    Raises:
        ConfigError: the tokenizer or the model of the config cannot be had, or `out` cannot be written.
        DataError: a process died.
    """
    lists = ExcludeLists(target.shards.sources)  # what a user may have misspelt is told before anything is indexed
    with ExitStack() as stack:
        lines = None if out is None else stack.enter_context(_opened(out))
        prepare(target)
        processes = stack.enter_context(Processes(workers, target.shards.storage))
        report = LintReport([], target.shards.max_bad_fraction)
        found = []
        for number, source in enumerate(target.shards.sources):
            report.sources.append(SourceReport(source.name))
            found.append(_walk_source(target, number, report.sources[-1], processes, lists))
        for name, text in lists.warnings():
            next(source for source in report.sources if source.name == name).unmatched.append(text)
        jobs = (part for number, walked in enumerate(found) for part in _parts(target, number, walked))
        total = sum(facts.samples for walked in found for facts in walked if facts.problem is None)
        with work_progress("samples", total) as advance:
            for job, judged in processes.run(judge, jobs):
                _add(report.sources[job.source], judged, lines)
                advance(judged.samples)
    return report


def _opened(out: Path) -> IO[str]:
    try:
        return out.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from error


def _parts(target: Target, source: int, shards: list[ShardFacts]) -> Iterator[SampleRange]:
    for facts in shards:
        if facts.problem is None:
            yield from ranges(target, source, facts.url, facts.samples)


def _walk_source(
    target: Target, number: int, report: SourceReport, processes: Processes, lists: ExcludeLists
) -> list[ShardFacts]:
    """All shards of a source walked; what is odd goes into the report."""
    source = target.shards.sources[number]
    try:
        urls = expand_shards(source)
    except DataError as error:
        report.problem = str(error)
        return []
    report.shards = len(urls)
    walked: list[ShardFacts] = []
    with work_progress(f"{source.name}: shards", len(urls)) as advance, Repeats() as keys:
        for _, facts in processes.run(walk_shard, [(url, source.fields) for url in urls]):
            samples = len(facts.key_hashes) // 16
            keys.add(facts.key_hashes, len(walked), np.arange(samples))
            lists.look(source.name, facts.url, facts.key_hashes)
            report.unread += unmapped(facts.members, source.fields)
            facts.key_hashes = b""
            walked.append(facts)
            _note_shard(facts, report)
            advance(1)
        _note_repeats(keys, walked, report)
    _note_names(urls, report)
    if not any(facts.samples or facts.problem for facts in walked):
        report.problem = f"no samples in {len(urls)} shards; members must be named KEY.EXTENSION"
    return walked


def _note_shard(facts: ShardFacts, report: SourceReport) -> None:
    if facts.problem is not None:
        report.notes.append((what.UNREADABLE, facts.url, facts.problem))
        return
    report.returning += facts.returning
    report.returning_examples += facts.returning_examples[: MAX_EXAMPLES - len(report.returning_examples)]
    some = ", ".join
    found = [
        (what.DAMAGED, facts.damage),
        (what.SIDECARS, None if facts.sidecars == "fresh" else facts.sidecars),
        (what.NO_SAMPLES, None if facts.samples else "the shard holds none"),
        (what.UNSAFE, f"{facts.unsafe} members: {some(facts.unsafe_examples)}" if facts.unsafe else None),
        (
            what.RETURNING,
            f"{facts.returning} times, as another sample: {some(facts.returning_examples)}"
            if facts.returning
            else None,
        ),
        (what.LOOSE, f"{facts.other_members} names without KEY.EXTENSION" if facts.other_members else None),
    ]
    report.notes += [(kind, facts.url, detail) for kind, detail in found if detail]


def _note_repeats(keys: Repeats, shards: list[ShardFacts], report: SourceReport) -> None:
    """Keys that stand in several shards: different samples to training, and easily confused by people."""
    count, examples = 0, []
    for group in keys.groups():
        places = sorted({shard for shard, _ in group})
        if len(places) > 1:
            count += 1
            examples = heapq.nsmallest(MAX_EXAMPLES, [*examples, (group[0], places)])
    if not count:
        return
    named = []
    for (shard, sample), places in examples:
        index = load_index(shards[shard].url)
        key = repr(index.entry(sample).key) if sample < index.num_samples else "a cut sample"
        named.append(f"{key} in {len(places)} shards ({shards[places[0]].url}, {shards[places[1]].url}, ...)")
    report.notes.append((what.REPEATED, report.name, f"{count} keys: {'; '.join(named)}"))


def _note_names(urls: list[str], report: SourceReport) -> None:
    names = Counter(url.rsplit("/", 1)[-1] for url in urls)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        detail = f"{len(twice)} names in several folders ({twice[0]}, ...): filters.exclude takes them for one shard"
        report.notes.append((what.SAME_NAME, report.name, detail))


def _add(report: SourceReport, judged: Judged, lines: IO[str] | None) -> None:
    report.samples += judged.samples
    report.bad += len(judged.bad)
    report.filtered.update(judged.filtered)
    report.unread += judged.unread
    for record in judged.bad:
        report.add_reason(record)
        if lines is not None:
            lines.write(json.dumps(asdict(record)) + "\n")
