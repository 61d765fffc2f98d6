"""The loader: the steps of one rank, each a few `PackedBatch`es with the loader's state after them.

    lanes (rows of the global batch)      rank k reads lanes k, k + world_size, ...
      -> one row of each per step         its j-th lane is row j % micro_rows of micro-batch j // micro_rows
      -> micro-batches                    rows that no lane fills are empty and weigh nothing

The global batch of a step, that is its rows in lane order, depends on config, seed and step alone. Usable under any
training loop: `for step in loader`, `state_dict()`, `load_state_dict()`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trichord.batches.collate import collate
from trichord.batches.config import BatchesConfig
from trichord.batches.lane_reader import LaneGroup, LaneReader, LaneStep
from trichord.batches.loader_state import LaneCursor, LoaderState
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import RowArrays, build_row
from trichord.batches.tokenizer import load_tokenizer
from trichord.batches.windows import ItemLengths, SamplePlanner
from trichord.batches.workers import read_in_workers
from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig
from trichord.shards.lanes import LanePlanner, LaneSource
from trichord.shards.quarantine import QuarantineRecord
from trichord.shards.reader import SourceTable, open_sources

__all__ = ["ItemLengths", "Loader", "LoaderState", "StepBatch", "StepStats", "count_steps"]

_log = get_logger(__name__)


@dataclass(frozen=True)
class StepStats:
    """Counts of one step on this rank.

    samples: used; samples_per_source: the same by source name. bad_samples: left out at this step, by their index, text
    or content; records: one per bad sample. useful_tokens of row_tokens are no slack. wait_seconds: time the caller
    waited for the step's rows.
    """

    samples: int
    bad_samples: int
    useful_tokens: int
    row_tokens: int
    samples_per_source: dict[str, int]
    wait_seconds: float
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
    ) -> None:
        """Open the sources (missing sidecars are built) and take this rank's lanes.

        Args:
            lengths: how many tokens an item becomes in the model; None for a tower the model lacks.
            state: merged state of an earlier job, of any world size; None: from the start.
            augment: training changes to images and audio as configured; False for evaluation.

        Raises:
            ConfigError: the rank or the tokenizer does not fit. DataError: a source cannot be read.
            CheckpointError: the state belongs to other data or another packing.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank must be 0 to world_size - 1, got rank {rank} of {world_size}")
        tables = open_sources(shards)
        tokenizer = load_tokenizer(batches.tokenizer)
        self.tokenizer = tokenizer
        self._planner = SamplePlanner(tables, samples, batches, tokenizer, lengths, shards.max_member_bytes)
        self._order = _order(shards, batches, tables, seed)
        self._batches = batches
        self._seed = seed
        self._augment = augment
        self._lanes = list(range(rank, batches.rows_per_step, world_size))
        self.micro_steps = -(-batches.rows_per_step // (world_size * batches.micro_rows))
        data = _data_identity(shards, batches, tables, tokenizer.fingerprint(), seed)
        cursors = {lane: LaneCursor(self._order.first_state(lane)) for lane in range(batches.rows_per_step)}
        self._start = LoaderState(0, cursors, data)
        self._image_size = samples.image.size
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
        self._state = LoaderState(state.step, {lane: state.lanes[lane] for lane in self._lanes}, state.data)

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

    def __iter__(self) -> Iterator[StepBatch]:
        self.close()
        self._running = self._steps()
        return self._running

    def _steps(self) -> Iterator[StepBatch]:
        rows = self._read()
        checked = False
        try:
            while True:
                asked = time.monotonic()
                lane_steps = next(rows)
                step = self._assemble(lane_steps, time.monotonic() - asked)
                if not checked:
                    for batch in step.micro_batches:
                        batch.check()
                    checked = True
                self._state = step.state
                yield step
        finally:
            rows.close()

    def _read(self) -> Iterator[list[LaneStep]]:
        if self._batches.num_workers == 0 or not self._lanes:
            return self._make_group(self._lanes).steps()
        return read_in_workers(self._lanes, self._make_group, self._batches.num_workers, self._batches.prefetch_steps)

    def _make_group(self, lanes: Sequence[int]) -> LaneGroup:
        cursors = {lane: self._state.lanes[lane] for lane in lanes}
        return LaneGroup(self._order, self._planner, self._seed, self._augment, cursors, self._state.step)

    def _assemble(self, lane_steps: Sequence[LaneStep], wait_seconds: float) -> StepBatch:
        rows = [step.row for step in lane_steps]
        size = self._batches.micro_rows
        missing = self.micro_steps * size - len(rows)
        rows += [self._empty_row()] * missing
        micro_batches = tuple(collate(rows[at : at + size]) for at in range(0, len(rows), size))
        cursors = {step.lane: step.cursor for step in lane_steps}
        state = LoaderState(self._state.step + 1, cursors, self._state.data)
        return StepBatch(micro_batches, state, self._stats(micro_batches, lane_steps, wait_seconds))

    def _empty_row(self) -> RowArrays:
        return build_row([], [], self.tokenizer, self._batches, self._image_size)

    def _stats(
        self, micro_batches: Sequence[PackedBatch], lane_steps: Sequence[LaneStep], wait_seconds: float
    ) -> StepStats:
        records = tuple(record for step in lane_steps for record in step.records)
        used = Counter()
        for step in lane_steps:
            used.update(step.row.sample_ids[~step.row.bad_segments, 0].tolist())
        names = [table.name for table in self._planner.tables]
        return StepStats(
            samples=sum(used.values()),
            bad_samples=len(records),
            useful_tokens=sum(batch.useful_tokens for batch in micro_batches),
            row_tokens=sum(len(batch.input_ids) for batch in micro_batches),
            samples_per_source={name: used[source] for source, name in enumerate(names)},
            wait_seconds=wait_seconds,
            records=records,
        )


def count_steps(
    shards: ShardsConfig,
    samples: SamplesConfig,
    batches: BatchesConfig,
    *,
    seed: int,
    lengths: ItemLengths,
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
    tables = open_sources(shards)
    tokenizer = load_tokenizer(batches.tokenizer)
    planner = SamplePlanner(tables, samples, batches, tokenizer, lengths, shards.max_member_bytes)
    order = _order(shards, batches, tables, seed)
    most = 0
    for lane in range(batches.rows_per_step):
        reader = LaneReader(order, planner, seed, LaneCursor(order.first_state(lane)))
        rows = 0
        while not reader.cursor.exhausted:
            row, _ = reader.next_row()
            if row or not reader.cursor.exhausted:  # a window without a good sample costs a row, except at the end
                rows += 1
        most = max(most, rows)
        if on_progress is not None:
            on_progress(lane + 1, batches.rows_per_step)
    return most


def _order(shards: ShardsConfig, batches: BatchesConfig, tables: Sequence[SourceTable], seed: int) -> LanePlanner:
    sources = [
        LaneSource(
            shard_sizes=table.shard_sizes,
            weight=source.weight,
            schedule=source.weight_schedule,
            group=tuple(source.group.split("/")) if source.group else (),
            epochs=source.epochs,
        )
        for source, table in zip(shards.sources, tables)
    ]
    return LanePlanner(
        seed,
        sources,
        group_weights=shards.group_weights,
        num_lanes=batches.rows_per_step,
        window_samples=shards.window_samples,
    )


def _data_identity(
    shards: ShardsConfig, batches: BatchesConfig, tables: Sequence[SourceTable], tokenizer: str, seed: int
) -> dict[str, Any]:
    """What the order of samples depends on, beside weights and epochs, which may change on resume. JSON types only."""
    return {
        "seed": seed,
        "rows_per_step": batches.rows_per_step,
        "row_tokens": batches.row_tokens,
        "max_samples_per_row": batches.max_samples_per_row,
        "window_samples": shards.window_samples,
        "tokenizer": tokenizer,
        "sources": [[table.name, table.num_samples] for table in tables],
    }


def _warn_of_waste(batches: BatchesConfig, micro_steps: int, rank: int, world_size: int) -> None:
    places = world_size * micro_steps * batches.micro_rows
    wasted = places - batches.rows_per_step
    if wasted and rank == 0:
        _log.warning(
            "%d of %d rows per step stay empty (%.0f %%): batches.rows_per_step %d is no multiple of world size %d x "
            "batches.micro_rows %d",
            *(wasted, places, 100 * wasted / places, batches.rows_per_step, world_size, batches.micro_rows),
        )
