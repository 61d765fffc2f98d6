"""Planning: which samples of a window go into which rows, known before anything large is read.

Text is read and tokenised here, image and audio sizes come from the index, so planned lengths are exact and the rows
of a window are a pure function of the data and the config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trichord.batches.config import BatchesConfig
from trichord.batches.interleave import SegmentLayout, plan_segment
from trichord.batches.packing import pack_rows
from trichord.batches.tokenizer import TextTokenizer
from trichord.core.seed import derive_seed
from trichord.samples.audio import resampled_length
from trichord.samples.config import SamplesConfig
from trichord.samples.sample import check_entry, read_text
from trichord.shards.index import SampleEntry
from trichord.shards.lanes import SampleRef, keyed_permutation
from trichord.shards.quarantine import BadSample, QuarantineRecord
from trichord.shards.reader import SourceTable


@dataclass(frozen=True)
class ItemLengths:
    """How many stream tokens an item becomes in this model; pure functions that the model's config decides.

    image: (width, height) in pixels, upright, before resizing -> (rows, columns) of tokens.
    audio: samples at the model's rate -> tokens.
    (0, 0) and 0 are allowed: the item goes to its tower but not into the stream. None: the model has no such tower,
    and the field is not read at all.
    """

    image: Callable[[int, int], tuple[int, int]] | None
    audio: Callable[[int], int] | None

    @property
    def fields(self) -> frozenset[str]:
        """The fields that the model takes."""
        towers = {"image": self.image, "audio": self.audio}
        return frozenset({"text"} | {name for name, tower in towers.items() if tower is not None})


@dataclass(frozen=True)
class PlannedSample:
    """A sample whose segment is laid out; prompt_ids and text_ids (n,) int32; group_id: see `PackedBatch.group_ids`."""

    ref: SampleRef
    entry: SampleEntry
    layout: SegmentLayout
    prompt_ids: np.ndarray
    text_ids: np.ndarray
    group_id: int


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be used, and what is said about it."""

    ref: SampleRef
    record: QuarantineRecord


@dataclass(frozen=True)
class WindowPlan:
    """The rows of one window in the order in which the lane gives them, and the samples left out of it."""

    rows: list[list[PlannedSample]]
    left_out: list[LeftOut]


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
        self.tables = list(tables)
        self.samples = samples
        self.batches = batches
        self.tokenizer = tokenizer
        self.lengths = lengths
        self.max_member_bytes = max_member_bytes

    def plan(self, ref: SampleRef) -> tuple[PlannedSample, str | None, dict[str, Any]]:
        """One sample with its text and metadata.

        Raises:
            BadSample: by its index or its text it cannot be used, or its segment is longer than a row.
            DataError: the storage failed.
        """
        table = self.tables[ref.source]
        entry = table.entry(ref.sample)
        check_entry(entry, table.config, self.samples, self.lengths.fields)
        members = {name: m for name, m in entry.members.items() if name == "meta" or name in self.lengths.fields}
        entry = replace(entry, members=members)
        text, meta = read_text(entry, table.config, self.samples, self.max_member_bytes)
        if text is None and not {"image", "audio"} & members.keys():
            raise BadSample("the text is blank and there is nothing else")
        prompt_ids = self._encode(meta.get("prompt") or "")
        text_ids = self._encode(text or "")
        layout = plan_segment(
            self._grid(entry), self._audio_tokens(entry), len(prompt_ids), None if text is None else len(text_ids)
        )
        if layout.length > self.batches.row_tokens:
            raise BadSample(f"longer than a row: {layout.length} tokens, batches.row_tokens {self.batches.row_tokens}")
        group_id = group_of(text, meta, table.name, ref.sample)
        return PlannedSample(ref, entry, layout, prompt_ids, text_ids, group_id), text, meta

    def plan_window(self, refs: Sequence[SampleRef], seed: int, lane: int, window: int) -> WindowPlan:
        """Plan all samples of a window, pack them into rows, shuffle the rows (packing put the long samples first)."""
        planned: list[PlannedSample] = []
        left_out: list[LeftOut] = []
        for ref in refs:
            try:
                planned.append(self.plan(ref)[0])
            except BadSample as bad:
                left_out.append(self.left_out(ref, bad))
        lengths = [sample.layout.length for sample in planned]
        rows = pack_rows(lengths, self.batches.row_tokens, self.batches.max_samples_per_row)
        order = keyed_permutation(len(rows), derive_seed(seed, "rows", lane, window))
        return WindowPlan([[planned[item] for item in rows[row]] for row in order], left_out)

    def left_out(self, ref: SampleRef, bad: BadSample) -> LeftOut:
        """The quarantine line of a sample: where it is and what is wrong with it."""
        table = self.tables[ref.source]
        entry = table.entry(ref.sample)
        members = entry.members.values()
        offset = next(
            (m.offset for m in members if m.name == bad.member), min((m.offset for m in members), default=None)
        )
        return LeftOut(ref, QuarantineRecord(entry.shard, entry.key, offset, bad.member, bad.reason, table.name))

    def _encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer.encode(text) if text else [], dtype=np.int32)

    def _grid(self, entry: SampleEntry) -> tuple[int, int] | None:
        if self.lengths.image is None or "image" not in entry.members or entry.image_size is None:
            return None
        return self.lengths.image(*entry.image_size)

    def _audio_tokens(self, entry: SampleEntry) -> int | None:
        frames, rate = entry.audio_frames, entry.audio_rate
        if self.lengths.audio is None or "audio" not in entry.members or frames is None or rate is None:
            return None
        return self.lengths.audio(resampled_length(frames, rate, self.samples.audio.sample_rate))


def group_of(text: str | None, meta: dict[str, Any], source: str, sample: int) -> int:
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
