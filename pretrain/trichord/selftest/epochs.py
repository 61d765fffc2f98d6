"""Every sample exactly once per epoch: a run's order planned anew, counted, and tied to what the run has read.

    order of the run's steps  =  digest of its last checkpoint  =  counts of samples that came out of its batches
    then on past its end, until each source has been read through once

A run with the same data digest has read the same samples in the same rows.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trichord.batches.lane_reader import LaneReader, LaneRow
from trichord.batches.loader_state import LaneCursor
from trichord.batches.windows import SamplePlanner
from trichord.checkpoints.load import read_facts, resolve_checkpoint
from trichord.provenance import Past, open_past
from trichord.shards.lanes import SampleRef

MAX_USES = 200_000
"""So many samples are planned at most: a whole epoch of a large source is not."""


@dataclass(frozen=True)
class EpochsRead:
    """What was counted. uses: of samples, in the run's steps and past them; epochs_in_run: by source, those read to
    their end within the run's steps; epochs_checked: likewise, with what was planned past them. faults: empty where
    each sample came exactly once in these epochs, and at most once in the others."""

    steps: int
    uses_in_run: int
    uses_checked: int
    epochs_in_run: dict[str, int]
    epochs_checked: dict[str, int]
    faults: tuple[str, ...]


class _Counted:
    """uses: of each sample in each epoch, as a segment or as one that was left out; used: by source."""

    def __init__(self) -> None:
        self.uses: Counter[SampleRef] = Counter()
        self.used: Counter[int] = Counter()
        self._in_pieces: set[SampleRef] = set()

    def add(self, row: LaneRow, bad: frozenset[tuple[str, str]]) -> None:
        self.uses.update(left.ref for left in row.left_out)
        for sample in row.samples:
            if (sample.shard, sample.key) not in bad:
                self.used[sample.ref.source] += 1
            if sample.whole or sample.ref not in self._in_pieces:
                self.uses[sample.ref] += 1
            if not sample.whole:
                self._in_pieces.add(sample.ref)


def read_epochs(run: Path) -> EpochsRead:
    """Count the samples of a finished run. Raises CheckpointError, ConfigError where its data cannot be opened."""
    past = open_past(run, 1)
    newest = read_facts(resolve_checkpoint(run))
    lanes = [
        LaneReader(past.order, past.planner, past.config.run.seed, past.start.lanes[lane])
        for lane in range(past.config.batches.num_lanes)
    ]
    counted, bad = _Counted(), _bad_by_step(run)
    for step in range(newest.step):
        _take_step(lanes, step, past, counted, bad.get(step + 1, frozenset()))
    cursors = [lane.cursor for lane in lanes]
    faults = _against_the_run(run, cursors, newest.loader.lanes, _by_name(counted.used, past))
    in_run, uses_in_run = _complete_epochs(cursors, past.planner), counted.uses.total()
    step = newest.step
    while 0 in _complete_epochs(cursors, past.planner).values() and counted.uses.total() < MAX_USES:
        _take_step(lanes, step, past, counted, frozenset())
        cursors, step = [lane.cursor for lane in lanes], step + 1
    checked = _complete_epochs(cursors, past.planner)
    faults += _wrong_counts(counted.uses, checked, past.planner)
    return EpochsRead(newest.step, uses_in_run, counted.uses.total(), in_run, checked, tuple(faults))


def _take_step(
    lanes: list[LaneReader], step: int, past: Past, counted: _Counted, bad: frozenset[tuple[str, str]]
) -> None:
    for lane in lanes:
        for _ in range(past.config.batches.rows_per_lane):
            counted.add(lane.next_row(step), bad)


def _against_the_run(
    run: Path, planned: list[LaneCursor], saved: dict[int, LaneCursor], used: dict[str, int]
) -> list[str]:
    """Whether this order is what the run has read: by its checkpoint's digests, and by what its batches held."""
    faults = []
    if any(cursor.chain != saved[lane].chain for lane, cursor in enumerate(planned)):
        faults.append("the order planned anew does not reach the digests of the run's last checkpoint")
    recorded = json.loads((run / "data.json").read_text())["samples_per_source"]
    if recorded != used:
        faults.append(f"the run's batches held {recorded} samples, the order planned anew holds {used}")
    return faults


def _by_name(used: Counter[int], past: Past) -> dict[str, int]:
    return {table.name: used[source] for source, table in enumerate(past.planner.tables)}


def _complete_epochs(cursors: list[LaneCursor], planner: SamplePlanner) -> dict[str, int]:
    """By source, how many epochs every lane has left behind, with no sample of them that still waits."""
    complete = {}
    for source, table in enumerate(planner.tables):
        behind = min(cursor.window.cursors[source][0] for cursor in cursors)
        waiting = [ref.epoch for cursor in cursors for ref in cursor.carried if ref.source == source]
        complete[table.name] = min([behind, *waiting])
    return complete


def _wrong_counts(uses: Counter[SampleRef], complete: dict[str, int], planner: SamplePlanner) -> list[str]:
    """Samples that came more than once in an epoch; and in a complete one, those that did not come."""
    names = [table.name for table in planner.tables]
    faults = [
        f"{names[ref.source]}: sample {ref.sample} came {count} times in epoch {ref.epoch}"
        for ref, count in uses.items()
        if count > 1
    ]
    for source, table in enumerate(planner.tables):
        for epoch in range(complete[table.name]):
            for sample in range(table.samples_at(epoch)):
                ref = SampleRef(source, epoch, sample)
                if not uses[ref] and not _is_filtered(planner, ref):
                    faults.append(f"{table.name}: sample {sample} did not come in epoch {epoch}")
    return faults


def _is_filtered(planner: SamplePlanner, ref: SampleRef) -> bool:
    """Filters and `long_samples` leave samples out by design, and only count them."""
    return bool(planner.plan_window([ref], last=True).filtered)


def _bad_by_step(run: Path) -> dict[int, frozenset[tuple[str, str]]]:
    """Samples that turned out bad when they were decoded: planned, but not among those used."""
    file = run / "quarantine.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    steps = {record.get("step") for record in records}
    return {step: frozenset((r["shard"], r["key"]) for r in records if r.get("step") == step) for step in steps}
