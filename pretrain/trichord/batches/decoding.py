"""Planned rows to arrays: the work of a decode worker. Stateless: any process may decode any row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trichord.batches.rows import DecodedClip, DecodedItems, RowArrays, RowFormat, build_row
from trichord.batches.windows import LeftOut, PlannedSample, SamplePlanner
from trichord.samples.sample import AugmentKey, decode_item
from trichord.shards.quarantine import BadSample, QuarantineRecord


@dataclass(frozen=True)
class DecodedRow:
    """A row's arrays, and the samples that turned out bad while it was decoded."""

    arrays: RowArrays
    bad: tuple[LeftOut, ...] = ()


class RowDecoder:
    """Decodes rows as one run wants them."""

    def __init__(self, planner: SamplePlanner, augment_seed: int | None) -> None:
        """augment_seed: of the changes that training makes to items; None: none are made."""
        self._planner = planner
        self._seed = augment_seed
        samples, batches, lengths = planner.samples, planner.batches, planner.lengths
        self._draws = {"image": samples.image.draws, "audio": samples.audio.draws}
        self._form = RowFormat.of(
            batches.row_tokens, samples.image.size, planner.tokenizer, lengths.num_mels, samples.targets
        )

    def decode(self, planned: Sequence[PlannedSample]) -> DecodedRow:
        """A row of these samples; the bad ones' slots are slack."""
        decoded: list[DecodedItems | None] = []
        bad: list[LeftOut] = []
        for sample in planned:
            try:
                decoded.append(self.decode_items(sample))
            except BadSample as error:
                decoded.append(None)
                bad.append(self._left_out(sample, error))
        return DecodedRow(self.build(planned, decoded), tuple(bad))

    def build(
        self, planned: Sequence[PlannedSample], decoded: Sequence[DecodedItems | None], row_tokens: int | None = None
    ) -> RowArrays:
        """A row of samples that are decoded already, of `row_tokens` where that is not the config's."""
        form = self._form if row_tokens is None else replace(self._form, row_tokens=row_tokens)
        return build_row(planned, decoded, form)

    def decode_items(self, sample: PlannedSample) -> DecodedItems:
        """The items of one sample.

        Raises:
            BadSample: one of them is unreadable, or not what the index says. DataError: the storage failed.
        """
        planner = self._planner
        decoded = []
        for number, item in enumerate(sample.items, start=sample.first_item):
            rng = None
            if self._seed is not None and self._draws[item.kind]:
                # The first item is keyed by its kind alone, so that adding further ones leaves it as it was.
                purpose = item.kind if number == 0 else f"{item.kind} {number}"
                rng = self._key(sample, self._seed).generator(purpose)
            array = decode_item(sample.shard, item, planner.samples, planner.max_member_bytes, rng)
            if item.kind == "image":
                decoded.append(array)
            elif planner.lengths.log_mel is None:
                decoded.append(DecodedClip(len(array), waveform=array))
            else:
                decoded.append(DecodedClip(len(array), log_mel=planner.lengths.log_mel(array)))
        return decoded

    def _left_out(self, sample: PlannedSample, bad: BadSample) -> LeftOut:
        """The quarantine line, from what the plan carries: a followed source may grow after this process began."""
        refs = [item.ref for item in sample.items]
        offset = next((ref.offset for ref in refs if ref.name == bad.member), refs[0].offset if refs else None)
        name = self._planner.tables[sample.ref.source].name
        return LeftOut(sample.ref, QuarantineRecord(sample.shard, sample.key, offset, bad.member, bad.reason, name))

    def _key(self, sample: PlannedSample, seed: int) -> AugmentKey:
        return AugmentKey(seed, self._planner.tables[sample.ref.source].name, sample.ref.epoch, sample.ref.sample)
