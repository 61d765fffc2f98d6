"""The loader: the steps of one rank, each a few `PackedBatch`es with the loader's state after them.

    lanes (parts of the global batch)     each gives as many rows per step
      -> rows of the step                 dealt to ranks; a rank's j-th row is in micro-batch j // micro_rows
      -> micro-batches                    places that no row fills are empty and weigh nothing

The global batch of a step, that is its rows in lane order, depends on config, seed and step alone. Usable under any
training loop: `for step in loader`, `state_dict()`, `load_state_dict()`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trichord.batches.collate import collate
from trichord.batches.config import BatchesConfig
from trichord.batches.dealing import RowLayout
from trichord.batches.decoding import DecodedRow, RowDecoder
from trichord.batches.lane_reader import LaneReader
from trichord.batches.loader_state import LaneCursor, LoaderState, Tally
from trichord.batches.order import data_identity, lane_planner
from trichord.batches.own_loop import NO_LENGTH, refuse_workers, warn_of_other_ranks
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.step_planner import PlannedStep, StepPlanner
from trichord.batches.tokenizer import load_tokenizer
from trichord.batches.windows import ItemLengths, SamplePlanner
from trichord.batches.workers import read_in_workers
from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig
from trichord.shards.quarantine import QuarantineRecord
from trichord.shards.reader import open_sources

__all__ = ["ItemLengths", "Loader", "LoaderState", "StepBatch", "StepStats", "count_steps"]

_log = get_logger(__name__)


@dataclass(frozen=True)
class StepStats:
    """Counts of one step on this rank; of samples, only on the first of several that share rows.

    samples: used; samples_per_source, samples_per_shard: the same by name of the source and by URL of the shard.
    bad_samples: left out at this step, by their index, text or content; records: one per bad sample. filtered: samples
    left out by filters, by reason. useful_tokens of row_tokens are no slack. wait_seconds: time the caller waited for
    the step's rows. cost: of this rank's rows, as predicted; cost_undealt: of those it would
    have without dealing. imbalance: the most loaded rank of this rank's deal group
    over the group's mean, by predicted cost: as the rows lie, and as they were dealt.
    """

    samples: int
    bad_samples: int
    useful_tokens: int
    row_tokens: int
    samples_per_source: dict[str, int]
    samples_per_shard: dict[str, int]
    filtered: dict[str, int]
    wait_seconds: float
    cost: float
    cost_undealt: float
    imbalance: tuple[float, float]
    records: tuple[QuarantineRecord, ...]


@dataclass(frozen=True)
class StepBatch:
    """One step of one rank: as many micro-batches on every rank; `state` is the loader's after this step."""

    micro_batches: tuple[PackedBatch, ...]
    state: LoaderState
    stats: StepStats


class Loader:
    """Iterating yields a `StepBatch` per step, for ever: lanes that are used up give empty rows.

    A second `iter` goes on after the last step that was handed out.
    """

    def __init__(
        self,
        shards: ShardsConfig,
        samples: SamplesConfig,
        batches: BatchesConfig,
        *,
        seed: int,
        lengths: ItemLengths,
        rank: int = 0,
        world_size: int = 1,
        state: LoaderState | None = None,
        augment: bool = True,
        follow_folder: Path | None = None,
        sequence_place: int = 0,
        sequence_size: int = 1,
    ) -> None:
        """Open the sources (missing sidecars are built) and take this rank's rows.

        Args:
            lengths: how many tokens an item becomes in the model; None for a tower the model lacks.
            state: merged state of an earlier job, of any world size; None: from the start.
            augment: training changes to images and audio as configured; False for evaluation.
            follow_folder: where the shards of each epoch of followed sources are recorded, the same for all ranks.
            sequence_place, sequence_size: processes that share rows (sequence parallelism) have the same `rank` here,
                and each its place among them; the first one counts samples and keeps the state for all of them.

        Raises:
            ConfigError: the rank or the tokenizer does not fit. DataError: a source cannot be read.
            CheckpointError: the state belongs to other data or another packing.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be 0 to world_size - 1, got rank {rank} of {world_size}")
        warn_of_other_ranks(world_size * sequence_size)
        tables = open_sources(shards, follow_folder)
        tokenizer = load_tokenizer(batches.tokenizer)
        self.tokenizer = tokenizer
        self._planner = SamplePlanner(tables, samples, batches, tokenizer, lengths, shards.max_member_bytes)
        self._order = lane_planner(shards, self._planner, seed)
        self._decoder = RowDecoder(self._planner, seed if augment else None)
        self._layout = RowLayout(batches, rank, world_size)
        self._batches = batches
        self._seed = seed
        self._rank = rank
        self._place, self._sequence_size = sequence_place, sequence_size
        self._is_keeper = sequence_place == 0
        self._source_weights = _loss_weights(shards)
        self.micro_steps = self._layout.micro_steps
        cursors = {lane: LaneCursor(self._order.first_state(lane)) for lane in range(batches.num_lanes)}
        self._start = LoaderState(0, cursors, data_identity(shards, self._planner, seed))
        self._running: Iterator[StepBatch] | None = None
        self.load_state(state or self._start)
        _warn_of_waste(batches, self.micro_steps, rank, world_size)

    @property
    def state(self) -> LoaderState:
        """This rank's state after the last step that was handed out, never of what workers have read ahead."""
        return self._state

    @property
    def damage_records(self) -> list[QuarantineRecord]:
        """One record per shard that could not be read to its end; the same on every rank."""
        return [record for table in self._planner.tables for record in table.damage_records()]

    def load_state(self, state: LoaderState) -> None:
        """Go on from a merged state. Raises CheckpointError when it does not fit this loader's data."""
        state.check_fits(self._start.data)
        self.close()
        self._cursors = {lane: state.lanes[lane] for lane in self._layout.planned_lanes}
        # What is left out so far goes on with one rank, since merging adds up what the ranks have.
        left_out = state.left_out if self._rank == 0 and self._is_keeper else Tally()
        self._state = LoaderState(state.step, self._kept(state.lanes), state.data, left_out)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state as JSON types; merge those of all ranks (`LoaderState.merge`) to load them again."""
        return self._state.to_json()

    def load_state_dict(self, fields: dict[str, Any]) -> None:
        """Go on from the JSON form of a merged state."""
        self.load_state(LoaderState.from_json(fields))

    def close(self) -> None:
        """End the worker processes; iterating again starts new ones."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __len__(self) -> int:
        raise TypeError(NO_LENGTH)  # what a DataLoader around it asks first

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[StepBatch]:
        refuse_workers()
        self.close()
        self._running = self._steps()
        return self._running

    def _steps(self) -> Iterator[StepBatch]:
        rows = self._read()
        checked = False
        try:
            while True:
                asked = time.monotonic()
                planned, decoded = next(rows)
                step = self._assemble(planned, decoded, time.monotonic() - asked)
                if not checked:
                    for batch in step.micro_batches:
                        batch.check()
                    checked = True
                self._state, self._cursors = step.state, planned.cursors
                yield step
        finally:
            rows.close()

    def _read(self) -> Iterator[tuple[PlannedStep, list[DecodedRow]]]:
        if self._batches.num_workers == 0:
            return ((step, [self._decoder.decode(row) for row in step.rows]) for step in self._make_planner().steps())
        own_rows = len(self._layout.rows[self._layout.place])
        batches = self._batches
        return read_in_workers(self._make_planner, self._decoder, own_rows, batches.num_workers, batches.prefetch_steps)

    def _make_planner(self) -> StepPlanner:
        return StepPlanner(self._order, self._planner, self._seed, self._layout, self._cursors, self._state.step)

    def _kept(self, cursors: dict[int, LaneCursor]) -> dict[int, LaneCursor]:
        """Of the lanes whose state this rank keeps."""
        return {lane: cursors[lane] for lane in self._layout.own_lanes} if self._is_keeper else {}

    def _assemble(self, planned: PlannedStep, decoded: Sequence[DecodedRow], wait_seconds: float) -> StepBatch:
        rows = [row.arrays for row in decoded]
        size = self._batches.micro_rows
        missing = self.micro_steps * size - len(rows)
        if missing:
            rows += [self._decoder.build([], [])] * missing
        batches = [collate(rows[at : at + size]) for at in range(0, len(rows), size)]
        if self._source_weights is not None:
            batches = [batch.weighed(self._source_weights) for batch in batches]
        micro_batches = tuple(batch.shared(self._place, self._sequence_size) for batch in batches)
        left_out = [*planned.left_out, *(bad for row in decoded for bad in row.bad)] if self._is_keeper else []
        step = self._state.step + 1
        tally = self._state.left_out.add(item.ref for item in left_out)
        state = LoaderState(step, self._kept(planned.cursors), self._state.data, tally)
        records = tuple(replace(item.record, step=step) for item in left_out)
        return StepBatch(micro_batches, state, self._stats(micro_batches, planned, wait_seconds, records))

    def _stats(
        self,
        micro_batches: Sequence[PackedBatch],
        planned: PlannedStep,
        wait_seconds: float,
        records: tuple[QuarantineRecord, ...],
    ) -> StepStats:
        used: Counter[int] = Counter()
        for batch in micro_batches if self._is_keeper else ():
            used.update(batch.sample_ids.numpy()[~batch.bad_segments.numpy(), 0].tolist())
        names = [table.name for table in self._planner.tables]
        parts = [batch.own for batch in micro_batches]
        return StepStats(
            samples=sum(used.values()),
            bad_samples=len(records),
            useful_tokens=sum(own.useful_tokens for own in parts),
            row_tokens=sum(own.count(own.tokens) for own in parts),
            samples_per_source={name: used[source] for source, name in enumerate(names)},
            samples_per_shard=dict(planned.per_shard) if self._is_keeper else {},
            filtered=dict(planned.filtered) if self._is_keeper else {},
            wait_seconds=wait_seconds,
            cost=planned.cost,
            cost_undealt=planned.cost_undealt,
            imbalance=planned.imbalance,
            records=records,
        )


def count_steps(
    shards: ShardsConfig,
    samples: SamplesConfig,
    batches: BatchesConfig,
    *,
    seed: int,
    lengths: ItemLengths,
    follow_folder: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Steps until the last lane has used up the `epochs` of all sources, for runs whose length is given in epochs.

    Exact, because it plans every window as training will: it reads and tokenises all texts once, and decodes nothing.
    `on_progress` is called as (lanes done, lanes).

    Raises:
        ConfigError: a source is read for ever. DataError: a source cannot be read.
    """
    endless = [source.name for source in shards.sources if source.epochs is None]
    if endless:
        raise ConfigError(f"steps can be counted only where every source has `epochs`; missing for {endless}")
    tokenizer = load_tokenizer(batches.tokenizer)
    tables = open_sources(shards, follow_folder)
    planner = SamplePlanner(tables, samples, batches, tokenizer, lengths, shards.max_member_bytes)
    order = lane_planner(shards, planner, seed)
    most = 0
    for lane in range(batches.num_lanes):
        reader = LaneReader(order, planner, seed, LaneCursor(order.first_state(lane)))
        rows = 0
        while not reader.cursor.exhausted:
            row = reader.next_row(rows // batches.rows_per_lane)
            if row.samples or not reader.cursor.exhausted:  # a window without a good sample costs a row, but at the end
                rows += 1
        most = max(most, -(-rows // batches.rows_per_lane))
        if on_progress is not None:
            on_progress(lane + 1, batches.num_lanes)
    return most


def _loss_weights(shards: ShardsConfig) -> Tensor | None:
    """(sources,) fp32; None where all are alike."""
    weights = [source.loss_weight for source in shards.sources]
    return torch.tensor(weights) if any(weight != 1.0 for weight in weights) else None


def _warn_of_waste(batches: BatchesConfig, micro_steps: int, rank: int, world_size: int) -> None:
    if world_size % batches.deal_ranks and rank == 0:
        _log.warning(
            "batches.deal_ranks %d does not divide the %d ranks: the last group is smaller",
            batches.deal_ranks,
            world_size,
        )
    places = world_size * micro_steps * batches.micro_rows
    wasted = places - batches.rows_per_step
    if wasted and rank == 0:
        _log.warning(
            "%d of %d rows per step stay empty (%.0f %%): batches.rows_per_step %d is no multiple of world size %d x "
            "batches.micro_rows %d",
            *(wasted, places, 100 * wasted / places, batches.rows_per_step, world_size, batches.micro_rows),
        )
