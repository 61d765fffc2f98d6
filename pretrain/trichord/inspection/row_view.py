"""A `PackedBatch` read back as rows, segments and runs of tokens: what a page shows of it, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from trichord.batches.packed_batch import IGNORE_INDEX, SLACK_SEGMENT, SPAN_AUDIO, SPAN_IMAGE, PackedBatch
from trichord.batches.tokenizer import TextTokenizer

RunKind = Literal["special", "prompt", "learned", "image", "audio"]
_CONTEXT = 8  # tokens before one that its text may depend on: spaces, pieces of one character


@dataclass(frozen=True)
class Token:
    """One token of a text: its text alone (a mark for a special one), its id, and whether it is to be predicted."""

    text: str
    id: int
    learned: bool
    special: bool


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one kind, `start` to `end` in the row. tokens: of text; item: number of an image or clip
    in the batch. A special token is a run of its own."""

    kind: RunKind
    start: int
    end: int
    learned: bool = False
    tokens: tuple[Token, ...] = ()
    item: int | None = None


@dataclass
class SegmentView:
    """One sample, or piece of one, in a row. bad: its slot is slack, with nothing in `runs`. images, clips: numbers in
    the batch, those of towers alone included. positions: (least, most) per axis time, height, width."""

    number: int
    start: int
    end: int
    sample: tuple[int, int, int]
    bad: bool
    group: int
    labels: int = 0
    runs: list[Run] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    positions: tuple[tuple[float, float], ...] = ()
    targets: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class RowView:
    """One row of `length` tokens, `useful` of which are no slack."""

    length: int
    useful: int
    segments: list[SegmentView]


def view_rows(batch: PackedBatch, row_tokens: int, tokenizer: TextTokenizer) -> list[RowView]:
    """The rows of a micro-batch whose rows all have `row_tokens` tokens; token places count from the row's start."""
    segment_ids = batch.segment_ids.numpy()
    rows = []
    for start in range(0, len(segment_ids), row_tokens):
        useful = int((segment_ids[start : start + row_tokens] != SLACK_SEGMENT).sum())
        rows.append(RowView(row_tokens, useful, []))
    for number in range(batch.num_segments):
        # The caption's place is inside the segment, or one behind its first token, bad or not.
        row = int(batch.text_spans[number, 0]) // row_tokens
        rows[row].segments.append(_segment(batch, number, row * row_tokens, row_tokens, tokenizer))
    for row in rows:
        for segment, following in zip(row.segments, [*row.segments[1:], None]):
            if segment.bad:
                segment.end = following.start if following else max(segment.end, segment.start)
    return rows


def _segment(batch: PackedBatch, number: int, offset: int, row_tokens: int, tokenizer: TextTokenizer) -> SegmentView:
    source, epoch, sample = batch.sample_ids[number].tolist()
    bad = bool(batch.bad_segments[number])
    targets = (batch.targets[number].numpy(), batch.target_present[number].numpy())
    view = SegmentView(number, 0, 0, (source, epoch, sample), bad, int(batch.group_ids[number]), targets=targets)
    if bad:
        view.start = int(batch.text_spans[number, 0]) - 1 - offset
        view.end = view.start + 1
        return view
    places = np.flatnonzero(batch.segment_ids[offset : offset + row_tokens].numpy() == number)
    view.start, view.end = int(places[0]), int(places[-1]) + 1
    span = slice(offset + view.start, offset + view.end)
    view.labels = int((batch.labels[span] != IGNORE_INDEX).sum())
    axes = batch.position_ids[:, span].numpy()
    view.positions = tuple((float(axis.min()), float(axis.max())) for axis in axes)
    view.images = np.flatnonzero(batch.image_segments.numpy() == number).tolist()
    view.clips = np.flatnonzero(batch.audio_segments.numpy() == number).tolist()
    view.runs = list(_runs(batch, view, offset, tokenizer))
    return view


def _runs(batch: PackedBatch, view: SegmentView, offset: int, tokenizer: TextTokenizer) -> Iterator[Run]:
    """The segment's stream, in order."""
    kinds = batch.span_kind[offset + view.start : offset + view.end].numpy()
    ids = batch.input_ids[offset + view.start : offset + view.end].tolist()
    labels = batch.labels[offset + view.start : offset + view.end].tolist()
    learned = [False, *(label != IGNORE_INDEX for label in labels[:-1])]  # labels are shifted by one
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    items = {SPAN_IMAGE: _spans(batch.image_spans, view.images), SPAN_AUDIO: _spans(batch.audio_spans, view.clips)}
    place = 0
    while place < len(ids):
        start = view.start + place
        if kinds[place] in items:
            item, end = items[int(kinds[place])][offset + start]
            kind: RunKind = "image" if kinds[place] == SPAN_IMAGE else "audio"
            yield Run(kind, start, end - offset, item=item)
            place = end - offset - view.start
        elif ids[place] in specials:
            token = Token(special_name(ids[place], tokenizer), ids[place], learned[place], True)
            yield Run("special", start, start + 1, learned[place], (token,))
            place += 1
        else:
            end = place + 1
            while end < len(ids) and kinds[end] == kinds[place] and learned[end] == learned[place]:
                if ids[end] in specials:
                    break
                end += 1
            texts = token_texts(ids[place:end], tokenizer)
            tokens = tuple(Token(text, i, learned[place], False) for text, i in zip(texts, ids[place:end]))
            kind = "learned" if learned[place] else "prompt"
            yield Run(kind, start, view.start + end, learned[place], tokens)
            place = end


def _spans(spans, numbers: Sequence[int]) -> dict[int, tuple[int, int]]:
    """First token in the batch -> (number of the item, end), of those in the stream."""
    ends = {int(spans[number, 0]): (number, int(spans[number, 1])) for number in numbers}
    return {start: (number, end) for start, (number, end) in ends.items() if end > start}


def special_name(token: int, tokenizer: TextTokenizer) -> str:
    """bos, eos or pad; tokenizers without a token of their own for the first and last use the end's."""
    names = {tokenizer.pad_id: "pad", tokenizer.bos_id: "bos", tokenizer.eos_id: "eos"}
    return names[token]


def token_texts(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """The text that each token adds to those before it; together they are the decoded text."""
    texts = []
    for end in range(1, len(ids) + 1):
        start = max(0, end - _CONTEXT)
        before, with_it = tokenizer.decode(ids[start : end - 1]), tokenizer.decode(ids[start:end])
        # A piece of a character shows nothing until its last byte is there.
        shown = before.rstrip("\ufffd")
        texts.append(with_it[len(shown) :] if with_it.startswith(shown) else with_it)
        if texts[-1].endswith("\ufffd") and end < len(ids):
            texts[-1] = texts[-1].rstrip("\ufffd")
    return texts
