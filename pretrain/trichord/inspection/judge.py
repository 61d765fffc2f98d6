"""Samples read and decoded as training would, one after the other, to learn which of them cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trichord.encoders.lengths import tower_lengths
from trichord.inspection.target import Target
from trichord.samples.filters import FilteredSample, SampleFilter
from trichord.samples.interleaved import Item
from trichord.samples.sample import decode_item, read_content
from trichord.samples.unread import Unread, read_meta, unread_of
from trichord.shards.index import load_header
from trichord.shards.lanes import SampleRef
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.reader import SourceTable
from trichord.shards.storage import shard_identity

if TYPE_CHECKING:
    from trichord.batches.windows import SamplePlanner

CHUNK_SAMPLES = 256


@dataclass(frozen=True)
class SampleRange:
    """Samples `start` to `stop` of one shard of source number `source`."""

    target: Target
    source: int
    shard: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"samples {self.start} to {self.stop - 1} of {self.shard}"


@dataclass
class Judged:
    """What became of a range: samples looked at, those that cannot be used, those that a filter leaves out, and what is
    in the others that none of them reads."""

    samples: int = 0
    bad: list[QuarantineRecord] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)
    unread: Unread = field(default_factory=Counter)


def ranges(target: Target, source: int, shard: str, samples: int) -> Iterator[SampleRange]:
    """A shard in parts small enough for many processes and one part's results."""
    for start in range(0, samples, CHUNK_SAMPLES):
        yield SampleRange(target, source, shard, start, min(start + CHUNK_SAMPLES, samples))


def judge(job: SampleRange) -> Judged:
    """Read and decode the samples of a range: by the model's planner where there is a config, else by the decoders."""
    table = open_shard_table(job.target, job.source, job.shard)
    if job.target.config is None:
        return _judge_alone(job, table)
    planner = shard_planner(job.target, table)
    refs = [SampleRef(0, 0, number) for number in range(job.start, job.stop)]
    plan = planner.plan_window(refs, last=True)
    judged = Judged(len(refs), [item.record for item in plan.left_out], Counter(plan.filtered))
    used: dict[SampleRef, list[Item]] = {}  # a sample cut into pieces is one sample
    for planned in sorted((sample for row in plan.rows for sample in row), key=lambda one: one.ref):
        used.setdefault(planned.ref, []).extend(planned.items)
    for ref, items in used.items():
        entry = table.entry(ref.sample)
        try:
            _decode(entry.shard, items, job.target)
        except BadSample as bad:
            judged.bad.append(planner.left_out(ref, bad).record)
        else:
            judged.unread.update(unread_of(entry, items, read_meta(entry, job.target.shards.max_member_bytes)))
    judged.bad.sort(key=lambda record: (record.offset or 0, record.key or ""))
    return judged


def open_shard_table(target: Target, source: int, shard: str) -> SourceTable:
    """One shard as a source of its own: sample numbers count from its beginning. The last one is kept."""
    asked = (shard, shard_identity(shard), source, target)
    if _opened.asked != asked:
        config = target.shards.sources[source]
        header = load_header(shard, config.fields)
        _opened.answer = SourceTable(config, [header], target.shards.max_members_per_sample)
        _opened.asked = asked
    return _opened.answer


def shard_planner(target: Target, table: SourceTable) -> SamplePlanner:
    """The planner of the config's model over one table."""
    from trichord.batches.windows import SamplePlanner

    assert target.config is not None
    tokenizer, lengths = _model_facts(target)
    config = target.config
    return SamplePlanner([table], config.samples, config.batches, tokenizer, lengths, config.shards.max_member_bytes)


def prepare(target: Target) -> None:
    """Find out here what every process would have to, so that it is in `known_grids` when they start.

    Raises:
        ConfigError: the tokenizer or the model of the config cannot be had.
    """
    if target.config is not None:
        _model_facts(target)


def _model_facts(target: Target):
    """Tokenizer and item lengths of the config's model; once per process, for they take seconds."""
    from trichord.batches.tokenizer import load_tokenizer

    config = target.config
    assert config is not None
    if _modelled.asked != target:
        streamed = config.fusion.trunk is not None
        lengths = tower_lengths(config.encoders, config.samples.image.size, streamed)
        _modelled.answer = load_tokenizer(config.batches.tokenizer), lengths
        _modelled.asked = target
    return _modelled.answer


@dataclass
class _Last:
    """The last answer of this process: configs hold mappings, so functools cannot remember by them."""

    asked: Any = None
    answer: Any = None


_opened, _modelled = _Last(), _Last()


def _judge_alone(job: SampleRange, table: SourceTable) -> Judged:
    judged = Judged(job.stop - job.start)
    keep = SampleFilter(table.config.filters)
    for number in range(job.start, job.stop):
        entry = table.entry(number)
        samples, limit = job.target.samples, job.target.shards.max_member_bytes
        try:
            content = read_content(entry, table.config, samples, limit, keep, job.target.fields)
            _decode(entry.shard, content.items, job.target)
            judged.unread.update(unread_of(entry, content.items, content.meta))
        except FilteredSample as filtered:
            judged.filtered[filtered.reason] += 1
        except BadSample as bad:
            judged.bad.append(bad_record(table, number, bad))
    return judged


def bad_record(table: SourceTable, number: int, bad: BadSample) -> QuarantineRecord:
    """The line about a bad sample, as a run would write it."""
    entry = table.entry(number)
    refs = [*entry.members.values(), *(sibling.ref for sibling in entry.siblings.values())]
    named = [ref.offset for ref in refs if ref.name == bad.member]
    offset = named[0] if named else min((ref.offset for ref in refs), default=None)
    return QuarantineRecord(entry.shard, entry.key, offset, bad.member, bad.reason, table.name)


def _decode(shard: str, items, target: Target) -> None:
    for item in items:
        decode_item(shard, item, target.samples, target.shards.max_member_bytes, None)
