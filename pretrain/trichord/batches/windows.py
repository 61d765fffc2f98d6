"""Planning: which samples of a window go into which rows, known before anything large is read.

    references -> content (texts read) -> parts with token ids -> pieces no longer than a row -> rows

Text is read and tokenised here, image and audio sizes come from the index, so planned lengths are exact and the rows
of a window are a pure function of the data and the config.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.drafts import DraftPart, draft_parts
from trichord.batches.interleave import StreamPart, segment_length
from trichord.batches.packed_batch import SPAN_TEXT
from trichord.batches.packing import group_rows, pack_rows, split_parts
from trichord.batches.tokenizer import TextTokenizer
from trichord.samples.audio import clip_samples
from trichord.samples.config import SamplesConfig
from trichord.samples.filters import FilteredSample, SampleFilter
from trichord.samples.interleaved import Item
from trichord.samples.sample import SampleContent, read_content
from trichord.samples.targets import read_targets
from trichord.shards.entries import SampleEntry
from trichord.shards.lanes import SampleRef, keyed_permutation
from trichord.shards.members import MemberRef
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.reader import SourceTable

TOO_LONG = "longer than a row"
ITEM_TOO_LONG = "an image or clip alone longer than a row"
"""Why a sample is left out, in the words that it is counted by; see `BatchesConfig.long_samples`."""
_CARRIED_FROM = 0.02
"""Share of a row that is free, from which on its samples wait for the next window."""


@dataclass(frozen=True)
class ItemLengths:
    """How many stream tokens an item becomes in this model; pure functions that the model's config decides.

    image: (width, height) in pixels, upright, before resizing -> (rows, columns) of tokens.
    audio: samples at the model's rate -> tokens.
    (0, 0) and 0 are allowed: the item goes to its tower but not into the stream. None: the model has no such tower,
    and the field is not read at all.
    log_mel: waveform (n,) int16 -> (frames, num_mels) float32, where workers compute it; None: the device does.
    cost: (stream tokens, images, audio samples) of a row -> predicted work, in any unit; None: stream tokens.
    """

    image: Callable[[int, int], tuple[int, int]] | None
    audio: Callable[[int], int] | None
    log_mel: Callable[[np.ndarray], np.ndarray] | None = None
    num_mels: int = 0
    cost: Callable[[int, int, int], float] | None = None

    @cached_property
    def fields(self) -> frozenset[str]:
        """The fields that the model takes."""
        towers = {"image": self.image, "audio": self.audio}
        return frozenset({"text"} | {name for name, tower in towers.items() if tower is not None})


@dataclass(slots=True)  # frozen, it would take three times as long to make, twice for each sample
class PlannedSample:
    """One segment: a sample, or a piece of one that is longer than a row.

    parts: its stream, [BOS] included. items: its images and clips in the order of `parts`. first_item: number of the
    first of them in the whole sample. group_id: see `PackedBatch.group_ids`. targets (C,) float32 and target_present
    (N,) bool: see `PackedBatch.targets`. key, shard: where it comes from, for messages. audio_samples: of its clips.
    whole: no piece.
    """

    ref: SampleRef
    key: str
    shard: str
    parts: tuple[StreamPart, ...]
    items: tuple[Item, ...]
    group_id: int
    targets: np.ndarray
    target_present: np.ndarray
    audio_samples: int = 0
    first_item: int = 0
    whole: bool = True
    length: int = field(init=False)

    def __post_init__(self) -> None:
        self.length = segment_length(self.parts)

    def __reduce__(self) -> tuple[Callable[..., PlannedSample], tuple]:
        """As plain tuples, which travel to the decoding processes in half the time that named ones take."""
        items = tuple((item.kind, tuple(item.ref), item.size) for item in self.items)
        plain = tuple(self.ref), self.key, self.shard, tuple(map(tuple, self.parts)), items, self.group_id
        return _from_plain, (*plain, self.targets, self.target_present, self.audio_samples, self.first_item, self.whole)


def _from_plain(ref, key, shard, parts, items, *others) -> PlannedSample:
    named = tuple(Item(kind, MemberRef._make(member), size) for kind, member, size in items)
    return PlannedSample(SampleRef._make(ref), key, shard, tuple(map(StreamPart._make, parts)), named, *others)


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be used, and what is said about it."""

    ref: SampleRef
    record: QuarantineRecord


@dataclass(frozen=True)
class WindowPlan:
    """The rows of one window in the order in which the lane gives them, the samples that are carried into the next
    window, the bad ones left out, and how many each filter left out, those that are too long among them."""

    rows: list[list[PlannedSample]] = field(default_factory=list)
    carried: tuple[SampleRef, ...] = ()
    left_out: list[LeftOut] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)


class SamplePlanner:
    """Turns sample references into planned samples; holds what planning needs and nothing that changes."""

    def __init__(
        self,
        tables: Sequence[SourceTable],
        samples: SamplesConfig,
        batches: BatchesConfig,
        tokenizer: TextTokenizer,
        lengths: ItemLengths,
        max_member_bytes: int,
    ) -> None:
        """Raises ConfigError when an exclude list of a source cannot be read."""
        self.tables = list(tables)
        self.filters = [SampleFilter(table.config.filters) for table in tables]
        self.samples = samples
        self.batches = batches
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.max_member_bytes = max_member_bytes
        self._begin = StreamPart.text([tokenizer.bos_id])
        self._end = StreamPart.text([tokenizer.eos_id], learned=True)

    def read(self, ref: SampleRef) -> tuple[SampleEntry, SampleContent]:
        """What the index knows of a sample, and its content, nothing large decoded.

        Raises:
            BadSample: by its index, text or json it cannot be used. FilteredSample: a filter leaves it out.
            DataError: the storage failed.
        """
        table = self.tables[ref.source]
        entry = table.entry(ref.sample)
        keep = self.filters[ref.source]
        fields = self.lengths.fields
        return entry, read_content(entry, table.config, self.samples, self.max_member_bytes, keep, fields)

    def plan(self, ref: SampleRef) -> tuple[PlannedSample, SampleContent]:
        """One sample as one segment, and its content.

        Raises:
            BadSample, FilteredSample, DataError: as `read`; BadSample also where its segment is longer than a row.
        """
        entry, content = self.read(ref)
        drafts = draft_parts(content, self.batches)
        ids = self.tokenizer.encode_batch([part.text for part in drafts if part.text])
        planned = self._planned(ref, entry, content, drafts, ids)
        if planned.length > self.batches.row_tokens:
            raise BadSample(f"longer than a row: {planned.length} tokens, batches.row_tokens {self.batches.row_tokens}")
        return planned, content

    def plan_window(
        self,
        refs: Sequence[SampleRef],
        *,
        carried: Sequence[SampleRef] = (),
        last: bool = False,
        order_seed: int = 0,
    ) -> WindowPlan:
        """Plan all samples of a window, pack them into rows, shuffle the rows (packing put the long samples first).

        Args:
            carried: samples that the window before left over; they are planned first. last: nothing may be carried on,
                since no window follows. order_seed: of the order of the rows.
        """
        plan, waiting = WindowPlan(), frozenset(carried)
        planned = self._plan_all([*carried, *refs], plan)
        rows = self._pack([sample.length for sample in planned], sum(s.ref in waiting for s in planned))
        packed = [[planned[item] for item in row] for row in rows]
        left_over = None if last else self._left_over(packed, waiting)
        if left_over is not None:
            plan = replace(plan, carried=tuple(sample.ref for sample in packed.pop(left_over)))
        plan.rows.extend(packed[row] for row in keyed_permutation(len(packed), order_seed))
        return plan

    def _pack(self, lengths: list[int], num_waiting: int) -> list[list[int]]:
        batches = self.batches
        if batches.packing == "count":
            return group_rows(lengths, batches.row_tokens, batches.max_samples_per_row)
        return pack_rows(lengths, batches.row_tokens, batches.max_samples_per_row, num_waiting)

    def _left_over(self, rows: Sequence[Sequence[PlannedSample]], carried: frozenset[SampleRef]) -> int | None:
        """The row that is carried into the next window instead of being given half empty; None: all are given.

        The emptiest, of those without a sample that was carried already (none waits twice) or is a piece.
        """
        free = {
            number: self._free(row)
            for number, row in enumerate(rows)
            if all(sample.whole and sample.ref not in carried for sample in row)
        }
        emptiest = max(free, key=lambda number: (free[number], -number), default=None)
        return emptiest if emptiest is not None and len(rows) > 1 and free[emptiest] > _CARRIED_FROM else None

    def _free(self, row: Sequence[PlannedSample]) -> float:
        """Share of a row that nothing fills."""
        batches = self.batches
        if batches.packing == "count":
            return 1 - len(row) / batches.max_samples_per_row
        return 1 - sum(sample.length for sample in row) / batches.row_tokens

    def left_out(self, ref: SampleRef, bad: BadSample) -> LeftOut:
        """The quarantine line of a sample: where it is and what is wrong with it."""
        table = self.tables[ref.source]
        entry = table.entry(ref.sample)
        members = [*entry.members.values(), *(sibling.ref for sibling in entry.siblings.values())]
        offset = next(
            (m.offset for m in members if m.name == bad.member), min((m.offset for m in members), default=None)
        )
        return LeftOut(ref, QuarantineRecord(entry.shard, entry.key, offset, bad.member, bad.reason, table.name))

    def _plan_all(self, refs: Sequence[SampleRef], plan: WindowPlan) -> list[PlannedSample]:
        """All samples of a window; its texts are tokenised in one call."""
        drafts: list[tuple[SampleRef, SampleEntry, SampleContent, list[DraftPart]]] = []
        for ref in refs:
            try:
                entry, content = self.read(ref)
                drafts.append((ref, entry, content, draft_parts(content, self.batches)))
            except BadSample as bad:
                plan.left_out.append(self.left_out(ref, bad))
            except FilteredSample as filtered:
                plan.filtered[filtered.reason] += 1
        ids = iter(self.tokenizer.encode_batch([part.text for *_, parts in drafts for part in parts if part.text]))
        planned: list[PlannedSample] = []
        for ref, entry, content, parts in drafts:
            own = [next(ids) for part in parts if part.text]
            try:
                planned += self._fit(self._planned(ref, entry, content, parts, own))
            except BadSample as bad:
                plan.left_out.append(self.left_out(ref, bad))
            except FilteredSample as filtered:
                plan.filtered[filtered.reason] += 1
        return planned

    def _planned(
        self,
        ref: SampleRef,
        entry: SampleEntry,
        content: SampleContent,
        drafts: Sequence[DraftPart],
        ids: Sequence[Sequence[int]],
    ) -> PlannedSample:
        """ids: of each draft with text. Raises BadSample for a target that is not of its kind."""
        targets, present = read_targets(content.meta, self.samples.targets)
        encoded = iter(ids)
        parts = [self._begin]
        audio_samples = 0
        for draft in drafts:
            if draft.item is not None:
                part, samples = self._item_part(draft.item)
                parts.append(part)
                audio_samples += samples
            if draft.text:
                parts.append(StreamPart.text(next(encoded), draft.learned, draft.caption))
            if draft.ends:
                parts.append(self._end)
        group_id = group_of(content.text, content.meta, self.tables[ref.source].name, ref.sample)
        return PlannedSample(
            ref, entry.key, entry.shard, tuple(parts), content.items, group_id, targets, present, audio_samples
        )

    def _item_part(self, item: Item) -> tuple[StreamPart, int]:
        """An item's stretch of the stream, and its samples if it is a clip."""
        if item.kind == "image":
            assert self.lengths.image is not None  # `read` has refused what the model has no tower for
            return StreamPart.image(self.lengths.image(*item.size)), 0
        assert self.lengths.audio is not None
        samples = clip_samples(*item.size, self.samples.audio)
        return StreamPart.audio(self.lengths.audio(samples)), samples

    def _fit(self, sample: PlannedSample) -> list[PlannedSample]:
        """The sample, or its pieces where it is longer than a row.

        Raises:
            FilteredSample: it may have no pieces, or can have none: its bytes are good, and the config wants it so.
        """
        row_tokens = self.batches.row_tokens
        if sample.length <= row_tokens:
            return [sample]
        if self.batches.long_samples == "drop":
            raise FilteredSample(TOO_LONG)
        pieces = split_parts(sample.parts, row_tokens, self.tokenizer.bos_id)
        if pieces is None:
            raise FilteredSample(ITEM_TOO_LONG)
        planned, first_item = [], 0
        for parts in pieces:
            count = sum(part.kind != SPAN_TEXT for part in parts)
            items = sample.items[first_item : first_item + count]
            clips = sum(clip_samples(*item.size, self.samples.audio) for item in items if item.kind == "audio")
            planned.append(
                PlannedSample(
                    *(sample.ref, sample.key, sample.shard, tuple(parts), items, sample.group_id),
                    *(sample.targets, sample.target_present, clips, first_item, False),
                )
            )
            first_item += count
        return planned


def group_of(text: str | None, meta: Mapping[str, Any], source: str, sample: int) -> int:
    """Which item a sample is in contrastive objectives, as a stable 63-bit hash.

    `group` of the metadata decides; else the text without regard to case and white space; else the sample itself.
    """
    if meta.get("group") is not None:
        identity = f"group\x1f{meta['group']}"
    elif text is not None:
        identity = f"text\x1f{' '.join(text.casefold().split())}"
    else:
        identity = f"sample\x1f{source}\x1f{sample}"
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
