"""One sample: what its index promises, its content in reading order, and its decoded items.

Two moments touch a sample. When its window is planned: `read_content`, after which every length is known. When its row
is built: `decode_item`. Content faults raise `BadSample` in both; I/O faults are `DataError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from trichord.core.errors import TrichordError
from trichord.core.phase import set_phase
from trichord.samples.audio import clip_samples, decode_audio, is_cropped
from trichord.samples.config import SamplesConfig
from trichord.samples.filters import SampleFilter
from trichord.samples.generators import numpy_generator
from trichord.samples.image import check_pixels, decode_image
from trichord.samples.interleaved import Item, Turn, parse_messages
from trichord.samples.member import open_member
from trichord.samples.text import check_chars, decode_meta, decode_text
from trichord.shards.config import SourceConfig
from trichord.shards.index import SampleEntry
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import read_ref

Result = TypeVar("Result")


class SampleContent(NamedTuple):
    """A sample as it is read, nothing large decoded yet.

    items: image, then audio, of a sample made of fields; all items of a chat or document, in reading order. text: the
    caption, None where absent or blank. turns: of a chat or document, else None. meta: its json member.
    """

    items: tuple[Item, ...]
    text: str | None
    turns: tuple[Turn, ...] | None
    meta: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class DecodedSample:
    """A sample as evaluation sees it; None marks an absent field.

    pixels (3, size, size) uint8 RGB; waveform (n,) int16 mono at `samples.audio.sample_rate`; text without its prompt.
    Of a chat or document these are its first image and clip, and no text.
    """

    source: str
    key: str
    pixels: np.ndarray | None
    waveform: np.ndarray | None
    text: str | None
    meta: Mapping[str, Any] = field(default_factory=dict)


class AugmentKey(NamedTuple):
    """What training randomness of one sample is keyed by; without one, nothing is augmented."""

    seed: int
    source: str
    epoch: int
    sample: int

    def generator(self, purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "augment", purpose, self.source, self.epoch, self.sample)


def read_content(
    entry: SampleEntry,
    source: SourceConfig,
    config: SamplesConfig,
    max_member_bytes: int,
    keep: SampleFilter | None = None,
    used: frozenset[str] = frozenset({"image", "audio", "text"}),
) -> SampleContent:
    """What is in a sample and in which order; every item is within its caps.

    Args:
        keep: the source's filters. used: the fields the model takes; a sample's other ones are not looked at.

    Raises:
        FilteredSample: a filter leaves it out.
        BadSample: by its index, its text or its json it cannot be used, or a required field is missing.
        DataError: the storage failed.
    """
    if keep is not None:
        keep.check_entry(entry)  # first, so that a list of bad samples leaves out what the index finds bad
    if entry.problem:
        raise BadSample(entry.problem)
    meta = _read_meta(entry, config, max_member_bytes)
    if keep is not None:
        keep.check_meta(meta)
    if "messages" in meta:
        return _read_chat(entry, source, config, meta, used)
    items = _field_items(entry, source, config, used)
    text = _read_text(entry, source, config, max_member_bytes) if "text" in used else None
    if text is None and not items:
        raise BadSample("the text is blank and there is nothing else")
    return SampleContent(items, text, None, meta)


def decode_item(
    shard: str,
    item: Item,
    config: SamplesConfig,
    max_member_bytes: int,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Pixels (3, size, size) uint8, or a waveform (n,) int16 with n = `clip_samples` of the indexed length.

    Args:
        rng: draws the augmentation; None: nothing is augmented.

    Raises:
        BadSample: unreadable content, or content that is not what its index says; names the member.
        DataError: the storage failed.
        RuntimeError: a fault in the code, with the name of the member.
    """
    try:
        if item.kind == "audio" and is_cropped(*item.size, config.audio):
            member = open_member(shard, item.ref, max_member_bytes)
            set_phase("decode", shard=shard, member=item.ref.name)
            return _blamed(item.ref, lambda: decode_audio(member, config.audio, item.size, rng))
        data = read_ref(shard, item.ref, max_member_bytes)
        set_phase("decode", shard=shard, member=item.ref.name)
        if item.kind == "image":
            return _blamed(item.ref, lambda: decode_image(data, config.image, item.size, rng))
        return _blamed(item.ref, lambda: decode_audio(data, config.audio, item.size, rng))
    except (BadSample, TrichordError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"decoding member {item.ref.name!r} of shard {shard} failed: {error!r}") from error


def _read_meta(entry: SampleEntry, config: SamplesConfig, max_member_bytes: int) -> dict[str, Any]:
    ref = entry.members.get("meta")
    if ref is None:
        return {}
    data = read_ref(entry.shard, ref, max_member_bytes)
    meta = _blamed(ref, lambda: decode_meta(data))
    _blamed(ref, lambda: check_chars(len(meta.get("prompt") or ""), config.text))
    return meta


def _read_chat(
    entry: SampleEntry, source: SourceConfig, config: SamplesConfig, meta: dict[str, Any], used: frozenset[str]
) -> SampleContent:
    ref = entry.members["meta"]
    turns = _blamed(ref, lambda: parse_messages(meta["messages"], entry.key, entry.siblings, config.text))
    parts = [part for turn in turns for part in turn.content]
    items = tuple(part for part in parts if isinstance(part, Item))
    present = {item.kind for item in items} | ({"text"} if len(items) < len(parts) else set())
    _check_required(source, present)
    for item in items:
        if item.kind not in used:
            raise BadSample(f"`messages` names {item.kind}, and the model takes {', '.join(sorted(used))}", ref.name)
        _check_caps(item, config)
    return SampleContent(items, None, turns, meta)


def _field_items(
    entry: SampleEntry, source: SourceConfig, config: SamplesConfig, used: frozenset[str]
) -> tuple[Item, ...]:
    _check_required(source, entry.members.keys())
    if not used & entry.members.keys():
        found = sorted(entry.members) or "nothing"
        raise BadSample(f"the sample has none of {', '.join(sorted(used))}; it has {found}")
    items = []
    if "image" in used and "image" in entry.members:
        if entry.image_size is None:
            raise BadSample("the index has no size of the image", entry.members["image"].name)
        items.append(Item("image", entry.members["image"], entry.image_size))
    if "audio" in used and "audio" in entry.members:
        if entry.audio_frames is None or entry.audio_rate is None:
            raise BadSample("the index has no length of the audio", entry.members["audio"].name)
        items.append(Item("audio", entry.members["audio"], (entry.audio_frames, entry.audio_rate)))
    for item in items:
        _check_caps(item, config)
    return tuple(items)


def _check_required(source: SourceConfig, present) -> None:
    for name in source.require:
        if name not in present:
            raise BadSample(f"the sample has no {name}, which source {source.name!r} requires")


def _check_caps(item: Item, config: SamplesConfig) -> None:
    try:
        if item.kind == "image":
            check_pixels(item.size, config.image)
        else:
            clip_samples(*item.size, config.audio)
    except BadSample as bad:
        raise BadSample(bad.reason, item.ref.name) from bad


def _read_text(entry: SampleEntry, source: SourceConfig, config: SamplesConfig, max_member_bytes: int) -> str | None:
    ref = entry.members.get("text")
    if ref is None:
        return None
    if entry.text_chars is not None:
        chars = entry.text_chars
        _blamed(ref, lambda: check_chars(chars, config.text))
    data = read_ref(entry.shard, ref, max_member_bytes)
    text = _blamed(ref, lambda: decode_text(data, config.text))
    if text is None and "text" in source.require:
        raise BadSample(f"the text is blank, and source {source.name!r} requires text", ref.name)
    return text


def _blamed(ref: MemberRef, action: Callable[[], Result]) -> Result:
    """Run `action`; a BadSample out of it names the member it is about."""
    try:
        return action()
    except BadSample as bad:
        raise BadSample(bad.reason, bad.member or ref.name) from bad
