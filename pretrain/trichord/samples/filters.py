"""Filters: which samples of a source are read. What they leave out is counted by reason, and is not bad data."""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any

from trichord.core.errors import ConfigError
from trichord.samples.text import value_at
from trichord.shards.config import FiltersConfig, MetaFilter
from trichord.shards.index import SampleEntry


class FilteredSample(Exception):  # noqa: N818  no error: the user asked for it
    """A sample that a filter leaves out. reason: which filter, the same words for all samples that it leaves out."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SampleFilter:
    """The filters of one source, ready to be asked."""

    def __init__(self, config: FiltersConfig) -> None:
        """Reads the exclude lists.

        Raises:
            ConfigError: a list cannot be read, or a line of it names no shard and key.
        """
        self._config = config
        self._excluded: dict[str, frozenset[str]] = {}
        bounds = config.model_dump(exclude={"exclude", "meta"})
        self._bounded = any(bound is not None for bound in bounds.values())
        digest = hashlib.blake2b(config.model_dump_json(exclude={"exclude"}).encode(), digest_size=16)
        pairs = sorted({pair for path in config.exclude for pair in read_exclude_list(path)})
        for shard, key in pairs:
            digest.update(json.dumps([shard, key]).encode())
        for shard in {shard for shard, _ in pairs}:
            self._excluded[shard] = frozenset(key for other, key in pairs if other == shard)
        self.digest = digest.hexdigest()
        """Of everything that decides what is left out; the paths of the lists do not."""

    @property
    def reads_meta(self) -> bool:
        return bool(self._config.meta)

    def check_entry(self, entry: SampleEntry) -> None:
        """Judge by the index alone. A field that the sample lacks is not judged.

        Raises:
            FilteredSample: the first filter that leaves the sample out.
        """
        config = self._config
        if self._excluded and entry.key in self._excluded.get(os.path.basename(entry.shard), ()):
            raise FilteredSample("exclude")
        if not self._bounded:
            return
        if entry.image_size is not None:
            short, long = sorted(entry.image_size)
            _at_least("min_image_side", short, config.min_image_side)
            _at_most("max_image_aspect", long / short if short else math.inf, config.max_image_aspect)
        if entry.audio_frames is not None and entry.audio_rate:
            seconds = entry.audio_frames / entry.audio_rate
            _at_least("min_audio_seconds", seconds, config.min_audio_seconds)
            _at_most("max_audio_seconds", seconds, config.max_audio_seconds)
        if entry.text_chars is not None:
            _at_least("min_text_chars", entry.text_chars, config.min_text_chars)
            _at_most("max_text_chars", entry.text_chars, config.max_text_chars)

    def check_meta(self, meta: dict[str, Any]) -> None:
        """Judge by the json member; {} where the sample has none.

        Raises:
            FilteredSample: the first filter that leaves the sample out.
        """
        for rule in self._config.meta:
            value = value_at(meta, rule.key)
            keep = rule.missing == "keep" if value is None else _passes(rule, value)
            if not keep:
                raise FilteredSample(f"meta {rule.key}{_why(rule, value)}")


def _passes(rule: MetaFilter, value: Any) -> bool:
    """A value of another type than the rule speaks of does not pass."""
    if rule.min is not None or rule.max is not None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if not (rule.min is None or value >= rule.min) or not (rule.max is None or value <= rule.max):
            return False
    if rule.one_of and not _is_one_of(value, rule.one_of):
        return False
    return not (rule.none_of and _is_one_of(value, rule.none_of))


def _why(rule: MetaFilter, value: Any) -> str:
    """What the user may not have meant: a key that is not there, a number that is text (as in csv tables)."""
    if value is None:
        return " (not there)"
    ranged = rule.min is not None or rule.max is not None
    return " (text, not a number)" if ranged and isinstance(value, str) else ""


def _is_one_of(value: Any, choices: tuple) -> bool:
    """Equal and of one type: True is not 1 here. A list passes by any of its values."""
    values = value if isinstance(value, list) else [value]
    return any(type(one) is type(choice) and one == choice for one in values for choice in choices)


def _at_least(name: str, value: float, bound: float | None) -> None:
    if bound is not None and value < bound:
        raise FilteredSample(name)


def _at_most(name: str, value: float, bound: float | None) -> None:
    if bound is not None and value > bound:
        raise FilteredSample(name)


def read_exclude_list(path: str) -> list[tuple[str, str]]:
    """(base name of the shard, key) per line of a JSON-lines file; lines about a whole shard have no key.

    Raises:
        ConfigError: the file cannot be read, or a line of it names no shard and key.
    """
    pairs = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                    shard, key = fields["shard"], fields["key"]
                    if not isinstance(shard, str) or not isinstance(key, (str, type(None))):
                        raise TypeError("shard and key must be text")
                except (ValueError, KeyError, TypeError) as error:
                    raise ConfigError(
                        f"filters.exclude: {path}, line {number}: expected a JSON object with `shard` and `key`, as in "
                        f"a run's quarantine.jsonl; {type(error).__name__}: {error}"
                    ) from error
                if key is not None:
                    pairs.append((os.path.basename(shard), key))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"filters.exclude: {path} cannot be read: {error}; correct the path") from error
    return pairs
