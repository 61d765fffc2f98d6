"""Some samples of a micro-batch as a person sees them: texts, pictures, sounds, and what the model says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trichord.batches.packed_batch import IGNORE_INDEX, SPAN_TEXT, PackedBatch
from trichord.batches.tokenizer import TextTokenizer


@dataclass(frozen=True)
class SampleView:
    """given: text that the model only reads; wanted: text it learns to say; predicted: what it finds likeliest in each
    token's place, given all before it (None: it was not asked); right: share of tokens it has right. pixels (3, H, W)
    uint8, waveforms (n,) int16."""

    source: int
    epoch: int
    number: int
    given: str
    wanted: str
    predicted: str | None
    right: float | None
    pixels: tuple[np.ndarray, ...] = ()
    waveforms: tuple[np.ndarray, ...] = ()


def pick_segments(batch: PackedBatch, limit: int) -> list[int]:
    """Up to `limit` samples: first one of each source and kind, then more, in the order of the stream."""
    images, clips = set(batch.image_segments.tolist()), set(batch.audio_segments.tolist())
    bad, ids = batch.bad_segments.tolist(), batch.sample_ids.tolist()
    good = [number for number in range(batch.num_segments) if not bad[number]]
    seen: set[tuple[int, bool, bool]] = set()
    first, more = [], []
    for number in good:
        kind = (ids[number][0], number in images, number in clips)
        (more if kind in seen else first).append(number)
        seen.add(kind)
    return sorted((first + more)[:limit])


def label_positions(batch: PackedBatch, segments: Sequence[int]) -> Tensor:
    """(K,) int64, ascending: the labelled positions of these samples."""
    own = batch.segment_ids[batch.label_index].long()
    return batch.label_index[torch.isin(own, torch.tensor(list(segments), dtype=torch.int64, device=own.device))]


def view_samples(
    batch: PackedBatch, segments: Sequence[int], chosen: Tensor | None, tokenizer: TextTokenizer
) -> list[SampleView]:
    """batch: on the CPU; chosen (K,): the model's tokens at `label_positions`; None: it has no language model."""
    positions = label_positions(batch, segments)
    said = dict(zip(positions.tolist(), chosen.tolist())) if chosen is not None else None
    return [_view(batch, number, said, tokenizer) for number in segments]


def _view(batch: PackedBatch, number: int, said: dict[int, int] | None, tokenizer: TextTokenizer) -> SampleView:
    places = (batch.segment_ids == number).nonzero()[:, 0].tolist()
    labels = batch.labels[places].tolist()
    labelled = [place for place, label in zip(places, labels) if label != IGNORE_INDEX]
    learned = {place + 1 for place in labelled}
    texts = [place for place in places if int(batch.span_kind[place]) == SPAN_TEXT and place not in learned]
    wanted = [int(batch.labels[place]) for place in labelled]
    predicted = [said[place] for place in labelled] if said is not None else None
    right = [one == two for one, two in zip(predicted, wanted)] if predicted else []
    source, epoch, sample = batch.sample_ids[number].tolist()
    return SampleView(
        *(source, epoch, sample),
        given=_text(texts, batch.input_ids[texts].tolist(), tokenizer),
        wanted=_text(labelled, wanted, tokenizer),
        predicted=_text(labelled, predicted, tokenizer) if predicted else None,
        right=sum(right) / len(right) if right else None,
        pixels=tuple(batch.pixels[i].numpy() for i in _items(batch.image_segments, number)),
        waveforms=tuple(_clip(batch, i) for i in _items(batch.audio_segments, number) if batch.waveforms.shape[0]),
    )


def _text(places: list[int], ids: list[int], tokenizer: TextTokenizer) -> str:
    """The text of tokens, without special ones; an ellipsis where something lies between."""
    special = set(tokenizer.special_ids.values())
    runs: list[list[int]] = []
    for before, place, token in zip([None, *places], places, ids):
        if before is None or place != before + 1:
            runs.append([])
        if token not in special:
            runs[-1].append(token)
    return " … ".join(text for run in runs if (text := tokenizer.decode(run).strip()))


def _items(segments: Tensor, number: int) -> list[int]:
    return (segments == number).nonzero()[:, 0].tolist()


def _clip(batch: PackedBatch, number: int) -> np.ndarray:
    return batch.waveforms[batch.audio_offsets[number] : batch.audio_offsets[number + 1]].numpy()
