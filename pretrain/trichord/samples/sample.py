"""One sample: what its index promises, its text, and its decoded items.

Two moments touch a sample. When its window is planned: `check_entry` and `read_text`, after which every length is
known. When its row is built: `decode_items`. Content faults raise `BadSample` in both; I/O faults are `DataError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from trichord.core.errors import TrichordError
from trichord.core.seed import numpy_generator
from trichord.samples.audio import check_duration, decode_audio
from trichord.samples.config import SamplesConfig
from trichord.samples.image import check_pixels, decode_image
from trichord.samples.text import check_chars, decode_meta, decode_text
from trichord.shards.config import SourceConfig
from trichord.shards.index import SampleEntry
from trichord.shards.quarantine import BadSample
from trichord.shards.reader import read_member

Item = TypeVar("Item")


@dataclass(frozen=True)
class DecodedSample:
    """A sample as the rooms below see it; None marks an absent field.

    pixels (3, size, size) uint8 RGB; waveform (n,) int16 mono at `samples.audio.sample_rate`; text without its prompt.
    """

    source: str
    key: str
    pixels: np.ndarray | None
    waveform: np.ndarray | None
    text: str | None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AugmentKey:
    """What training randomness of one sample is keyed by; without one, nothing is augmented."""

    seed: int
    source: str
    epoch: int
    sample: int

    def generator(self, purpose: str) -> np.random.Generator:
        return numpy_generator(self.seed, "augment", purpose, self.source, self.epoch, self.sample)


def check_entry(
    entry: SampleEntry,
    source: SourceConfig,
    config: SamplesConfig,
    used: frozenset[str] = frozenset({"image", "audio", "text"}),
) -> None:
    """Judge a sample by its index alone. used: the fields the model takes; the others are not looked at.

    Raises:
        BadSample: the index found a problem, a required field is missing, nothing is there, or a cap is passed.
    """
    if entry.problem:
        raise BadSample(entry.problem)
    for name in source.require:
        if name not in entry.members:
            raise BadSample(f"the sample has no {name}, which source {source.name!r} requires")
    present = used & entry.members.keys()
    if not present:
        raise BadSample(
            f"the sample has none of {', '.join(sorted(used))}; it has {sorted(entry.members) or 'nothing'}"
        )
    if "image" in present:
        if entry.image_size is None:
            raise BadSample("the index has no size of the image", entry.members["image"].name)
        size = entry.image_size
        _blamed(entry, "image", lambda: check_pixels(size, config.image))
    if "audio" in present:
        if entry.audio_frames is None or entry.audio_rate is None:
            raise BadSample("the index has no length of the audio", entry.members["audio"].name)
        frames, rate = entry.audio_frames, entry.audio_rate
        _blamed(entry, "audio", lambda: check_duration(frames, rate, config.audio))
    if "text" in present and entry.text_chars is not None:
        chars = entry.text_chars
        _blamed(entry, "text", lambda: check_chars(chars, config.text))


def read_text(
    entry: SampleEntry, source: SourceConfig, config: SamplesConfig, max_member_bytes: int
) -> tuple[str | None, dict[str, Any]]:
    """The text (None: absent or blank) and the metadata of a sample.

    Raises:
        BadSample: unreadable content, or blank text where the source requires text.
        DataError: the storage failed.
    """
    text, meta = None, {}
    if "text" in entry.members:
        data = read_member(entry, "text", max_member_bytes)
        text = _blamed(entry, "text", lambda: decode_text(data, config.text))
        if text is None and "text" in source.require:
            raise BadSample(f"the text is blank, and source {source.name!r} requires text", entry.members["text"].name)
    if "meta" in entry.members:
        data = read_member(entry, "meta", max_member_bytes)
        meta = _blamed(entry, "meta", lambda: decode_meta(data))
        _blamed(entry, "meta", lambda: check_chars(len(meta.get("prompt") or ""), config.text))
    return text, meta


def decode_items(
    entry: SampleEntry, config: SamplesConfig, max_member_bytes: int, augment: AugmentKey | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Pixels (3, size, size) uint8 and waveform (n,) int16 of a sample that `check_entry` passed; None where absent.

    Raises:
        BadSample: unreadable content, or content that is not what its index says.
        DataError: the storage failed.
        RuntimeError: a fault in the code, with the sample's name.
    """
    try:
        pixels = waveform = None
        if "image" in entry.members:
            data = read_member(entry, "image", max_member_bytes)
            rng = augment.generator("image") if augment else None
            pixels = _blamed(entry, "image", lambda: decode_image(data, config.image, entry.image_size, rng))
        if "audio" in entry.members:
            data = read_member(entry, "audio", max_member_bytes)
            rng = augment.generator("audio") if augment else None
            indexed = (entry.audio_frames or 0, entry.audio_rate or 0)
            waveform = _blamed(entry, "audio", lambda: decode_audio(data, config.audio, indexed, rng))
        return pixels, waveform
    except (BadSample, TrichordError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"decoding sample {entry.key!r} of shard {entry.shard} failed: {error!r}") from error


def _blamed(entry: SampleEntry, name: str, action: Callable[[], Item]) -> Item:
    """Run `action`; a BadSample out of it names the member it is about."""
    try:
        return action()
    except BadSample as bad:
        raise BadSample(bad.reason, bad.member or entry.members[name].name) from bad
