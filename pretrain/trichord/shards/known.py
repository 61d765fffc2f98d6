"""Which shards a run began with, so that one that is gone or has changed later can be named.

A loader's state holds one digest per source: it says that the shards are others, not which. `<run>/shards.json` does.
Followed sources have records of their own, see `follow`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from trichord.core.errors import DataError
from trichord.core.status import write_atomically
from trichord.shards.follow import RecordedShard
from trichord.shards.index import ShardHeader
from trichord.shards.locations import plain_name, shown

SHARDS_FILE = "shards.json"
"""Of a run folder."""
_FORMAT, _VERSION = "trichord-shards", 1
_MAX_NAMED = 3


def record_shards(file: Path, sources: Mapping[str, Sequence[ShardHeader]]) -> None:
    """Write down the shards of each source, in their order."""
    told = {
        name: [[plain_name(shard.url), shard.num_samples, shard.idx] for shard in shards]
        for name, shards in sources.items()
    }
    write_atomically(file, json.dumps({"format": _FORMAT, "version": _VERSION, "sources": told}) + "\n")


def check_shards(file: Path, sources: Mapping[str, Sequence[ShardHeader]], advice: str) -> None:
    """Compare with what was recorded; a copy of all shards elsewhere is the same data. Without a record that can be
    read (a run of an older version) nothing is compared: the digest of the loader's state still is.

    Args:
        advice: what to do, the end of the message.

    Raises:
        DataError: a shard is gone, new, or holds something else; names it.
    """
    try:
        fields = json.loads(file.read_bytes())
        if (fields["format"], fields["version"]) != (_FORMAT, _VERSION):
            return
        recorded = {
            name: [RecordedShard(str(url), int(samples), str(idx)) for url, samples, idx in shards]
            for name, shards in fields["sources"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return
    found = [
        f"source {name!r}: {'; '.join(changes)}"
        for name, shards in sources.items()
        if name in recorded and (changes := _changes(recorded[name], shards))
    ]
    if found:
        raise DataError(f"{'; '.join(found)}: the order of samples is another one; {advice}")


def _changes(before: Sequence[RecordedShard], now: Sequence[ShardHeader]) -> list[str]:
    """What is different, at most three shards of each kind; empty: the same samples in the same order."""
    after = [RecordedShard(plain_name(shard.url), shard.num_samples, shard.idx) for shard in now]
    if [shard[1:] for shard in before] == [shard[1:] for shard in after]:
        return []
    name = str if {shard.url for shard in before} & {shard.url for shard in after} else _base_name
    old, new = ({name(shard.url): shard for shard in shards} for shards in (before, after))
    gone = [f"shard {shown(old[key].url)} is not there any more" for key in old if key not in new]
    changed = [
        f"shard {shown(new[key].url)} has changed: it had {old[key].samples} samples with index {old[key].idx}, now "
        f"{new[key].samples} with {new[key].idx}"
        for key in old
        if key in new and old[key][1:] != new[key][1:]
    ]
    added = [f"shard {shown(new[key].url)} is new" for key in new if key not in old]
    told = [line for lines in (gone, changed, added) for line in _at_most(lines)]
    return told or ["its shards are the same in another order, as after renaming them"]


def _at_most(lines: list[str]) -> list[str]:
    more = len(lines) - _MAX_NAMED
    return lines if more <= 0 else [*lines[:_MAX_NAMED], f"and {more} more like it"]


def _base_name(url: str) -> str:
    """Of shards that were moved elsewhere."""
    return PurePosixPath(url).name
