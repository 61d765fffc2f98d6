"""Members that no sample reads: formats that no field takes, a further picture, conversations under another name.

None of this is bad data, so nothing stops over it; but a model that was to see pictures would learn from text alone.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from trichord.core.log import get_logger
from trichord.samples.interleaved import Item
from trichord.samples.text import decode_meta
from trichord.shards.config import FieldsConfig, SourceConfig
from trichord.shards.entries import FieldMap, SampleEntry
from trichord.shards.formats import instead, looks_like_media
from trichord.shards.index import ShardHeader, ShardIndex, load_index
from trichord.shards.members import is_unsafe, split_name
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import read_ref

_log = get_logger(__name__)
OTHER_CHATS = ("conversations", "conversation", "dialog", "dialogue", "chat", "turns")
"""Keys under which other tools keep the turns of a chat, as lists of objects; here they are `messages`."""
_LOOKED_AT = 64
_METAS_READ = 8
_KEYS_COMPARED = 50_000
_EXAMPLES = 3
_NOTABLE_FRAC = 0.05

Unread = Counter[tuple[str, str]]
"""(what kind of oversight, extension or key) -> how often."""
UNMAPPED, FURTHER, UNNAMED, CHAT_KEY = "unmapped", "further", "unnamed", "chat key"


def unmapped(exts: Mapping[str, int], fields: FieldsConfig) -> Unread:
    """Of the members of a shard, by extension: those that are mapped to nothing. Pickled code is told elsewhere."""
    known = FieldMap(fields)
    found: Unread = Counter()
    for ext, count in exts.items():
        if known.kind(ext) is None and ext not in known.fields["meta"] and not is_unsafe(ext):
            found[UNMAPPED, shape(ext)] += count
    return found


def unread_of(entry: SampleEntry, items: Iterable[Item], meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of one sample that is used: its pictures, clips and texts that are not, and a chat under another name.

    items: what is read of it. meta: its json member.
    """
    chat = "messages" in meta
    read = {item.ref.name for item in items} | (set() if chat else {ref.name for ref in entry.members.values()})
    for ext, sibling in entry.siblings.items():
        if sibling.ref.name not in read and not (chat and sibling.kind == "text"):
            yield (UNNAMED if chat else FURTHER), shape(ext)
    if not chat and (key := other_chat(meta)) is not None:
        yield CHAT_KEY, key


def read_meta(entry: SampleEntry, max_member_bytes: int) -> dict[str, Any]:
    """The json member of a sample; {} where it has none that can be used. Raises DataError where the storage fails."""
    if "meta" not in entry.members:
        return {}
    try:
        return decode_meta(read_ref(entry.shard, entry.members["meta"], max_member_bytes))
    except BadSample:
        return {}


def other_chat(meta: Mapping[str, Any]) -> str | None:
    """The key under which a json member holds a chat that nothing reads."""
    for key in OTHER_CHATS:
        turns = meta.get(key)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            return key
    return None


def shape(ext: str) -> str:
    """Numbers left out: the pictures of a chat are `0.jpg`, `1.jpg` and so on."""
    return re.sub(r"\d+(?=\.)", "N", ext)


def sentences(unread: Unread) -> list[str]:
    """What to tell the user, most frequent first."""
    return [_sentence(kind, name, count) for (kind, name), count in sorted(unread.items(), key=_most_first)]


def _most_first(one: tuple[tuple[str, str], int]) -> tuple[int, tuple[str, str]]:
    return -one[1], one[0]


def _sentence(kind: str, name: str, count: int) -> str:
    members = f"{count} member{'s' if count > 1 else ''} .{name}"
    if kind == CHAT_KEY:
        return f"{count} json members hold a chat under `{name}`, which is not read; chats are read under `messages`"
    if kind == UNNAMED:
        return f"{members}: of chats whose `messages` do not name them, so they are not read"
    if kind == FURTHER:
        return f"{members} are read by no sample: `fields` of the source names another member of it, or not .{name}"
    if (formats := instead(name)) is not None:
        return f"{members} are mapped to no field and are not read; convert them to {formats}"
    return f"{members} are mapped to no field (`fields` of the source) and are not read"


def scattered(times: int, examples: Sequence[str]) -> str:
    """About keys that come back in a shard after others."""
    return (
        f"{times} times a key comes back after others ({', '.join(examples)}): the members of one sample must stand "
        "together in the tar, and here each part is a sample of its own; write the tars sorted by name "
        "(tar --sort=name), or anew with `trichord data build`"
    )


def unmatched(path: str, lines: int, sources: Iterable[str]) -> str:
    """About an exclude list that leaves out nothing."""
    names = ", ".join(sources)
    return (
        f"filters.exclude: 0 of {lines} lines of {path} matched a sample of {names}; a line names its sample by "
        "the base name of the shard and the key: was it written for other shards?"
    )


def warn_at_start(
    sources: Sequence[tuple[SourceConfig, Sequence[ShardHeader]]],
    excluded: Mapping[str, Sequence[tuple[str, str]]],
    max_member_bytes: int,
) -> None:
    """One line per source whose first samples hold media that nothing reads, whose members are scattered, or whose
    exclude lists name none of its shards. It looks at one index and a few json members per source.

    excluded: path -> what `read_exclude_list` has read of it.

    Raises:
        DataError: the storage fails.
    """
    for source, shards in sources:
        first = next((shard for shard in shards if shard.num_samples), None)
        if first is not None:
            for line in _first_look(source, load_index(first.url, source.fields), max_member_bytes):
                _log.warning("source %s: in shard %s, %s", source.name, first.url, line)
    for path, listed in excluded.items():
        having = [(source.name, shards) for source, shards in sources if path in source.filters.exclude]
        there = {os.path.basename(shard.url) for _, shards in having for shard in shards}
        if listed and there.isdisjoint(shard for shard, _ in listed):
            _log.warning("%s", unmatched(path, len(listed), [name for name, _ in having]))


def _first_look(source: SourceConfig, index: ShardIndex, max_member_bytes: int) -> list[str]:
    number = min(index.num_samples, _LOOKED_AT)
    extensions: Counter[str] = Counter()
    found: Unread = Counter()
    metas = judged = 0
    for sample in range(number):
        extensions.update({ref.ext for ref in index.members(sample)})
        entry = index.entry(sample, source.fields)
        has_meta = "meta" in entry.members
        if entry.problem is not None or (has_meta and metas == _METAS_READ):
            continue
        metas, judged = metas + has_meta, judged + 1
        meta = read_meta(entry, max_member_bytes)
        found.update(set(unread_of(entry, _named(entry, meta), meta)))
    found += unmapped(extensions, source.fields)
    notable = {
        (kind, name): count
        for (kind, name), count in found.items()
        if kind == CHAT_KEY or looks_like_media(name)
        if count >= _NOTABLE_FRAC * (number if kind == UNMAPPED else judged)
    }
    return sentences(Counter(notable)) + _scattered_keys(index)


def _scattered_keys(index: ShardIndex) -> list[str]:
    keys = Counter(_key(index, sample) for sample in range(min(index.num_samples, _KEYS_COMPARED)))
    back = keys.total() - len(keys)
    if back < _NOTABLE_FRAC * keys.total():
        return []
    return [scattered(back, [key for key, count in keys.most_common(_EXAMPLES) if count > 1])]


def _key(index: ShardIndex, sample: int) -> str:
    return (split_name(index.members(sample)[0].name) or ("", ""))[0]


def _named(entry: SampleEntry, meta: Mapping[str, Any]) -> list[Item]:
    """Of a chat, every item: whether its `messages` name them all is for `trichord data lint` to tell."""
    if "messages" not in meta:
        return []
    return [Item(sibling.kind, sibling.ref, (1, 1)) for sibling in entry.siblings.values() if sibling.kind != "text"]
