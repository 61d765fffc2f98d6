"""Figures of a range of samples: what one process counts for `trichord data stats`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trichord.core.seed import derive_seed
from trichord.inspection.distribution import Distribution
from trichord.inspection.judge import SampleRange, open_shard_table, shard_planner
from trichord.inspection.target import Target
from trichord.samples.filters import FilteredSample, SampleFilter
from trichord.samples.sample import SampleContent, read_content
from trichord.samples.text import decode_meta, value_at
from trichord.shards.entries import SampleEntry
from trichord.shards.lanes import SampleRef
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import SourceTable, read_ref

MAX_CLASSES = 10_000
MAX_KEYS = 100
MAIN_FIELDS = ("image", "audio", "text", "meta")
"""The first of these that a sample has is what its duplicates are known by."""


@dataclass(frozen=True)
class Wishes:
    """What is asked for beside counts and sizes.

    labels: dotted paths in the json member whose classes are counted. tokenizer: folder or hub-id; None: the config's,
    or no tokens. text_frac: share of samples whose texts are tokenised. hashes: whether contents are hashed.
    """

    labels: tuple[str, ...] = ()
    tokenizer: str | None = None
    text_frac: float = 1.0
    hashes: bool = True


def class_keys(target: Target) -> tuple[str, ...]:
    """Keys of the targets that a config names, to be counted where nobody asks for others."""
    return tuple(dict.fromkeys(one.key for one in target.samples.targets.values()))


@dataclass
class Label:
    """Values of one key of the json member. other: values beyond the first 10,000 classes; numbers: of floats."""

    classes: Counter[str] = field(default_factory=Counter)
    missing: int = 0
    other: int = 0
    numbers: Distribution = field(default_factory=Distribution)

    @property
    def absent(self) -> bool:
        """Whether no sample has a value."""
        return not (self.classes or self.other or self.numbers.count)

    def add(self, value: Any) -> None:
        if value is None:
            self.missing += 1
        elif isinstance(value, list):
            for one in value:
                self.add(one)
        elif isinstance(value, float):
            self.numbers.add(abs(value))
        elif isinstance(value, dict):
            self.other += 1
        else:
            self._count(str(value), 1)

    def merge(self, other: Label) -> None:
        for name, count in other.classes.items():
            self._count(name, count)
        self.missing += other.missing
        self.other += other.other
        self.numbers.merge(other.numbers)

    def _count(self, name: str, count: int) -> None:
        if name in self.classes or len(self.classes) < MAX_CLASSES:
            self.classes[name] += count
        else:
            self.other += count


DISTRIBUTIONS = (
    "sample_bytes",
    "images_per_sample",
    "image_width",
    "image_height",
    "image_pixels",
    "image_aspect",
    "clips_per_sample",
    "audio_seconds",
    "text_chars",
    "text_tokens",
    "sample_tokens",
)


@dataclass
class Figures:
    """What was counted, over samples that no filter leaves out and whose index finds nothing wrong.

    spread: distributions by name; image_aspect is width / height, sample_bytes counts the members of fields. rates:
    clips by sample rate in Hz. json_keys: dotted paths that json members have, where labels are counted and one was not
    there. hashes: 16 bytes for each of `hashed`, sample numbers in the shard.
    """

    samples: int = 0
    bad: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    spread: dict[str, Distribution] = field(default_factory=lambda: {name: Distribution() for name in DISTRIBUTIONS})
    rates: Counter[int] = field(default_factory=Counter)
    labels: dict[str, Label] = field(default_factory=dict)
    json_keys: Counter[str] = field(default_factory=Counter)
    hashes: bytes = b""
    hashed: tuple[int, ...] = ()

    def merge(self, other: Figures) -> None:
        """Everything but the hashes."""
        self.samples += other.samples
        self.bad += other.bad
        self.filtered.update(other.filtered)
        self.rates.update(other.rates)
        self.json_keys.update(other.json_keys)
        for name, spread in other.spread.items():
            self.spread[name].merge(spread)
        for key, label in other.labels.items():
            self.labels.setdefault(key, Label()).merge(label)


def collect(job: tuple[SampleRange, Wishes]) -> Figures:
    """Count the samples of a range. Raises DataError where the storage fails."""
    place, wishes = job
    table = open_shard_table(place.target, place.source, place.shard)
    collector = _Collector(place, wishes, table)
    for number in range(place.start, place.stop):
        collector.add(number)
    return collector.finish()


class _Collector:
    def __init__(self, place: SampleRange, wishes: Wishes, table: SourceTable) -> None:
        self._place, self._wishes, self._table = place, wishes, table
        self._keep = SampleFilter(table.config.filters)
        self._limit = place.target.shards.max_member_bytes
        self._figures = Figures(labels={key: Label() for key in wishes.labels})
        self._hashes, self._hashed = bytearray(), []

    def add(self, number: int) -> None:
        entry = self._table.entry(number)
        figures = self._figures
        if entry.problem is not None:
            figures.bad += 1
            return
        try:
            self._keep.check_entry(entry)
            meta = self._meta(entry) if self._wishes.labels or self._keep.reads_meta else {}
            self._keep.check_meta(meta)
        except FilteredSample as filtered:
            figures.filtered[filtered.reason] += 1
            return
        except BadSample:
            figures.bad += 1
            return
        figures.samples += 1
        values = {key: value_at(meta, key) for key in figures.labels}
        for key, label in figures.labels.items():
            label.add(values[key])
        if None in values.values():
            self._note_keys(meta)
        self._measure(entry)
        if self._wishes.hashes:
            self._hash(entry, number)
        if self._chosen(number):
            self._count_tokens(entry, number)

    def finish(self) -> Figures:
        return replace(self._figures, hashes=bytes(self._hashes), hashed=tuple(self._hashed))

    def _meta(self, entry: SampleEntry) -> dict[str, Any]:
        ref = entry.members.get("meta")
        return {} if ref is None else decode_meta(read_ref(entry.shard, ref, self._limit))

    def _note_keys(self, meta: dict[str, Any]) -> None:
        """Which keys a label could have been."""
        keys = self._figures.json_keys
        for key in _dotted(meta):
            if key in keys or len(keys) < MAX_KEYS:
                keys[key] += 1

    def _measure(self, entry: SampleEntry) -> None:
        """Sizes of everything, from the index."""
        spread = self._figures.spread
        refs = {ref.name: ref for ref in (*entry.members.values(), *(s.ref for s in entry.siblings.values()))}
        spread["sample_bytes"].add(sum(ref.size for ref in refs.values()))
        counts: Counter[str] = Counter()
        for kind, _, measure in entry.siblings.values():
            if isinstance(measure, str):
                continue
            counts[kind] += 1
            if kind == "text":
                spread["text_chars"].add(measure)  # type: ignore[arg-type]
            elif kind == "image":
                width, height = measure  # type: ignore[misc]
                spread["image_width"].add(width)
                spread["image_height"].add(height)
                spread["image_pixels"].add(width * height)
                spread["image_aspect"].add(width / height)
            else:
                frames, rate = measure  # type: ignore[misc]
                spread["audio_seconds"].add(frames / rate)
                self._figures.rates[rate] += 1
        spread["images_per_sample"].add(counts["image"])
        spread["clips_per_sample"].add(counts["audio"])

    def _hash(self, entry: SampleEntry, number: int) -> None:
        name = next((name for name in MAIN_FIELDS if name in entry.members), None)
        try:
            data = read_ref(entry.shard, entry.members[name], self._limit) if name else b""
        except BadSample:
            return
        if data:
            self._hashes += hashlib.blake2b(data, digest_size=16).digest()
            self._hashed.append(number)

    def _chosen(self, number: int) -> bool:
        """A share of all samples, the same ones each time."""
        if self._place.target.config is None and self._wishes.tokenizer is None:
            return False
        frac = self._wishes.text_frac
        return frac >= 1 or derive_seed(0, "stats", self._place.shard, number) % 2**32 < frac * 2**32

    def _count_tokens(self, entry: SampleEntry, number: int) -> None:
        """Tokens of the texts, and of the whole segment where a model is known."""
        target, spread = self._place.target, self._figures.spread
        try:
            if target.config is None:
                content = read_content(
                    entry, self._table.config, target.samples, self._limit, None, frozenset({"image", "audio", "text"})
                )
            else:
                planned, content = shard_planner(target, self._table).plan(SampleRef(0, 0, number))
                spread["sample_tokens"].add(planned.length)
        except (BadSample, FilteredSample):
            return
        texts = _texts(content)
        if texts:
            spread["text_tokens"].add(sum(len(_tokenizer(self._place, self._wishes).encode(text)) for text in texts))


def _dotted(meta: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Paths of the values of a json object, down to the second level."""
    for name, value in meta.items():
        if isinstance(value, dict) and not prefix:
            yield from _dotted(value, f"{name}.")
        else:
            yield f"{prefix}{name}"


def _texts(content: SampleContent) -> list[str]:
    if content.turns is not None:
        return [part for turn in content.turns for part in turn.content if isinstance(part, str)]
    return [text for text in (content.meta.get("prompt"), content.text) if text]


_loaded: dict[str, Any] = {}


def _tokenizer(place: SampleRange, wishes: Wishes):
    """Loaded once per process."""
    from trichord.batches.tokenizer import load_tokenizer

    config = place.target.config
    name = wishes.tokenizer or (config.batches.tokenizer if config else "")
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = load_tokenizer(name)
    return _loaded[name]
