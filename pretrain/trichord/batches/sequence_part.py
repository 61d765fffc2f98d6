"""Sequence parallelism: what of a micro-batch each rank of a group computes, where all of them hold the same rows.

A rank has a stretch of the stream, as long as everybody's; images and clips are shared out evenly for the towers; so
are segments, for their texts and contrasts. What a tower makes goes to the rank whose stretch has its places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

Counts = Sequence[int]
Bounds = tuple[int, ...]
"""Rank r of the group has what lies from bounds[r] to bounds[r + 1]."""


@dataclass(frozen=True)
class ItemParts:
    """Of one modality, as bounds. items: who encodes which; rows: of the feature tokens that come of it, item by item,
    of those in the stream; places: of the same tokens, by whose stretch they stand in; contrasted: of the items, by
    whose segments they belong to."""

    items: Bounds
    rows: Bounds
    places: Bounds
    contrasted: Bounds


@dataclass(frozen=True)
class SequencePart:
    """One rank's part of a micro-batch; host numbers.

    place, size: of the rank in its group. tokens: of the stream. labels: of `label_index`. useful_tokens: this rank's,
    no slack. segments: whose texts are encoded and whose contrasts are computed where.
    """

    place: int
    size: int
    tokens: Bounds
    labels: Bounds
    useful_tokens: int
    segments: Bounds
    images: ItemParts
    audios: ItemParts

    def own(self, bounds: Bounds) -> slice:
        """What this rank has of something shared out by `bounds`."""
        return slice(bounds[self.place], bounds[self.place + 1])

    def count(self, bounds: Bounds) -> int:
        return bounds[self.place + 1] - bounds[self.place]


def whole(tokens: int, labels: int, useful_tokens: int, segments: int, images: Counts, audios: Counts) -> SequencePart:
    """The part of a rank that is alone with its rows, from how many there are of each. images, audios: tokens of each
    item in the stream."""

    def items(counts: Counts) -> ItemParts:
        rows = 0, sum(counts)
        return ItemParts((0, len(counts)), rows, rows, (0, len(counts)))

    return SequencePart(
        *(0, 1, (0, tokens), (0, labels), useful_tokens, (0, segments)), images=items(images), audios=items(audios)
    )


@dataclass(frozen=True)
class Items:
    """All items of one modality in a batch. counts: tokens of each; index: their places in the stream; segments: which
    each item belongs to; both ascending."""

    counts: Counts
    index: np.ndarray
    segments: np.ndarray


def part_of(
    place: int,
    size: int,
    *,
    segment_ids: np.ndarray,
    label_index: np.ndarray,
    num_segments: int,
    images: Items,
    audios: Items,
) -> SequencePart:
    """Rank `place` of `size`; the arrays are those of a `PackedBatch`.

    Raises:
        ValueError: the stream does not divide.
    """
    total = len(segment_ids)
    if total % size:
        raise ValueError(f"a stream of {total} tokens does not divide over {size} ranks of a sequence-parallel group")
    tokens, segments = _evenly(total, size), _evenly(num_segments, size)
    stretch = segment_ids[tokens[place] : tokens[place + 1]]
    return SequencePart(
        place,
        size,
        tokens,
        labels=_cut(label_index, tokens),
        useful_tokens=int(np.count_nonzero(stretch >= 0)),
        segments=segments,
        images=_item_parts(images, tokens, segments),
        audios=_item_parts(audios, tokens, segments),
    )


def _item_parts(all_items: Items, tokens: Bounds, segments: Bounds) -> ItemParts:
    items = _evenly(len(all_items.counts), len(tokens) - 1)
    before = (0, *accumulate(all_items.counts))
    rows = tuple(before[item] for item in items)
    return ItemParts(items, rows, _cut(all_items.index, tokens), _cut(all_items.segments, segments))


def _evenly(number: int, size: int) -> Bounds:
    return tuple(number * place // size for place in range(size + 1))


def _cut(ascending: np.ndarray, bounds: Bounds) -> Bounds:
    """Where the parts begin and end in ascending numbers that `bounds` cuts."""
    return tuple(np.searchsorted(ascending, bounds).tolist())
