"""The shards of each source: are they all there, are their sidecars current, can they be read to the end?"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from trichord.config.run import RunConfig
from trichord.core.errors import DataError, TrichordError
from trichord.shards.config import FieldsConfig, SourceConfig
from trichord.shards.index import Look, ShardIndex, load_index, look_at, walk_shard
from trichord.shards.locations import is_compressed, is_remote, shown
from trichord.shards.sources import expand_shards
from trichord.shards.storage import configure_storage, read_range, with_retries
from trichord_launch.preflight.finding import Finding, of_error
from trichord_launch.preflight.size import shown_size

_LOOKS_AT_ONCE = 16
_OPENED = 8
_NAMED = 3
_COPY = "copy them again; training would go on with the whole samples before the cut"


@dataclass
class SourceFacts:
    """What is known of a source's shards. opened: indexes of the sample of shards that was opened.

    walked: samples and bytes of shards that have no current sidecar and were walked over.
    """

    config: SourceConfig
    looks: list[Look] = field(default_factory=list)
    opened: list[ShardIndex] = field(default_factory=list)
    walked: list[tuple[int, int]] = field(default_factory=list)

    @property
    def samples(self) -> int | None:
        """Of all its shards; where some have no current sidecar, by the size of the others. None: nothing is known."""
        known = [(look.header.num_samples, look.bytes) for look in self.looks if look.header is not None]
        if len(known) == len(self.looks):
            return sum(samples for samples, _ in known)
        known += self.walked
        size = sum(size for _, size in known)
        return (
            round(sum(samples for samples, _ in known) * sum(look.bytes for look in self.looks) / size)
            if size
            else None
        )

    @property
    def is_counted(self) -> bool:
        """Whether `samples` is exact."""
        return all(look.header is not None for look in self.looks)


def check_shards(config: RunConfig) -> tuple[list[Finding], list[SourceFacts]]:
    """Findings on all sources, and the facts of those that could be listed."""
    configure_storage(config.shards.storage)
    findings: list[Finding] = []
    sources: list[SourceFacts] = []
    for source in config.shards.sources:
        facts = SourceFacts(source)
        try:
            findings += _look(facts)
            sources.append(facts)
        except TrichordError as error:
            remedy = "correct shards.sources[].shards, or copy the missing shards"
            findings.append(of_error(f"shards {source.name}", error, remedy))
    return findings, sources


def _look(facts: SourceFacts) -> list[Finding]:
    source = facts.config
    urls = expand_shards(source)
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as threads:  # looking at a remote shard is waiting
        facts.looks = list(threads.map(lambda url: look_at(url, source.fields), urls))
    size = shown_size(sum(look.bytes for look in facts.looks))
    listed = Finding(f"shards {source.name}", "pass", f"all {len(urls)} are there, {size}")
    return [listed, _sidecars(facts), _whole(facts)]


def _sidecars(facts: SourceFacts) -> Finding:
    name = f"sidecars {facts.config.name}"
    without = [look for look in facts.looks if look.header is None]
    if not without:
        return Finding(name, "pass", f"current for all {len(facts.looks)} shards")
    stale = sum(look.recorded_bytes is not None for look in without)
    size = shown_size(sum(look.bytes for look in without))
    counts = ((len(without) - stale, "without"), (stale, "with stale ones"))
    detail = f"of {len(facts.looks)} shards " + ", ".join(f"{count} {which}" for count, which in counts if count)
    patterns = " ".join(f'"{shown(pattern)}"' for pattern in facts.config.shards)
    if facts.config.fields != FieldsConfig():
        patterns = "CONFIG [overrides], for this source has fields of its own"
    remedy = f"trichord data index {patterns}; else the first rank reads {size} before step 0 while the others wait"
    return Finding(name, "warn", detail, remedy)


def _whole(facts: SourceFacts) -> Finding:
    """All sizes against the sidecars, and a sample of shards opened."""
    name = f"contents {facts.config.name}"
    shorter = [look for look in facts.looks if look.recorded_bytes is not None and look.bytes < look.recorded_bytes]
    cut = [
        f"truncated: {shown(look.url)} has {look.bytes} bytes, its sidecar was made for {look.recorded_bytes}"
        for look in shorter
    ]
    damaged = [f"{shown(look.url)}: {look.header.damage}" for look in facts.looks if look.header and look.header.damage]
    sample = _spread([look for look in facts.looks if look not in shorter])
    faults: list[str] = []
    for look in sample:
        try:
            faults += _open(facts, look)
        except TrichordError as error:
            faults.append(str(error))
    if cut or damaged or faults:
        return Finding(name, "fail", _some([*cut, *damaged, *faults]), _COPY, "data")
    done = ((len(facts.opened), "opened, first and last sample read"), (len(facts.walked), "walked from end to end"))
    said = "; ".join(f"{count} {how}" for count, how in done if count) or "none opened: no sidecars yet"
    return Finding(name, "pass", f"of {len(facts.looks)} shards {said}")


def _open(facts: SourceFacts, look: Look) -> list[str]:
    """Read the first and the last sample of a shard; one without a sidecar is walked over, if it lies on this disk."""
    if look.header is None:
        if is_remote(look.url) or is_compressed(look.url):
            return []
        samples, damage = walk_shard(look.url)
        facts.walked.append((samples, look.bytes))
        return [f"truncated: {look.url}: {damage}"] if damage else []
    index = load_index(look.url, facts.config.fields)
    facts.opened.append(index)
    for number in {0, index.num_samples - 1} if index.num_samples else ():
        for member in index.entry(number, facts.config.fields).members.values():
            data = with_retries(
                lambda ref=member: read_range(look.url, ref.offset, ref.size), f"reading shard {shown(look.url)}"
            )
            if len(data) != member.size:
                raise DataError(f"truncated: {shown(look.url)} ends inside {member.name!r}")
    return []


def _spread(looks: Sequence[Look]) -> list[Look]:
    """At most `_OPENED` of them, the first and the last among them."""
    if len(looks) <= _OPENED:
        return list(looks)
    return [looks[round(i * (len(looks) - 1) / (_OPENED - 1))] for i in range(_OPENED)]


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_NAMED]) + (f"; and {len(texts) - _NAMED} more" if len(texts) > _NAMED else "")
