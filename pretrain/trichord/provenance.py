"""The story of provenance: which samples a past step was made of, from the run folder and the shards alone.

Nothing is recorded per sample: the order is a pure function of config, seed and step, so the lanes are planned anew
from the nearest checkpoint before the step. The digest chain of the checkpoint behind it says whether that was right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trichord.batches.lane_reader import LaneReader, LaneRow
from trichord.batches.loader_state import LaneCursor, LoaderState
from trichord.batches.order import data_identity, lane_planner
from trichord.batches.tokenizer import TextTokenizer, load_tokenizer
from trichord.batches.windows import SamplePlanner
from trichord.checkpoints.load import read_facts
from trichord.checkpoints.manifest import incomplete_reason, step_folders
from trichord.config.identity import read_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError, DataError
from trichord.restore import TOKENIZER_FOLDER, item_lengths, stored_config
from trichord.shards.follow import FOLLOW_FOLDER
from trichord.shards.known import SHARDS_FILE, check_shards
from trichord.shards.lanes import LanePlanner
from trichord.shards.reader import open_sources

_ADVICE = "put the data back as it was, to tell what a past step was made of"


@dataclass(frozen=True)
class UsedSample:
    """One sample of a row. tokens: its length in the stream. left_out: why it was not used after all, if so."""

    lane: int
    row: int
    source: str
    epoch: int
    shard: str
    key: str
    tokens: int
    left_out: str = ""


@dataclass(frozen=True)
class Provenance:
    """The samples of a step. planned_from: step of the checkpoint the lanes were planned from, 0 for the start.
    verified_by: step of the checkpoint whose digests the planned order reached; None where there is none behind."""

    run: str
    step: int
    planned_from: int
    verified_by: int | None
    samples: list[UsedSample]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Past:
    """What a past step is made again from. config: of the attempt that made it; checkpoint: the newest before the step,
    None for the start; start: the loader there; goal: the loader at the oldest checkpoint that has the step behind it,
    where there is one; order, planner: of the run's data."""

    config: RunConfig
    checkpoint: Path | None
    start: LoaderState
    goal: LoaderState | None
    order: LanePlanner
    planner: SamplePlanner


def open_past(run: Path, step: int) -> Past:
    """Find the checkpoints around optimizer step `step` and open the run's data.

    Raises:
        ConfigError: no run folder, no such step. DataError: a shard is gone or has changed, and which.
        CheckpointError: the data is not what the run has seen; a checkpoint or the run's config is damaged.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is no run folder: expected config.yaml in it")
    newest = read_run_config(run)
    before, behind = (None if path is None else read_facts(path) for path in _checkpoints_around(run, step))
    # What the attempt that made the step was told: weights may have changed since.
    config = newest if behind is None else stored_config(behind.folder, behind.train_state["config"])
    planner = _planner(run, config)
    order = lane_planner(config.shards, planner, config.run.seed)
    identity = data_identity(config.shards, planner, config.run.seed)
    first = {lane: LaneCursor(order.first_state(lane)) for lane in range(config.batches.num_lanes)}
    start = LoaderState(0, first, identity) if before is None else before.loader
    own = {table.name: table.headers for table in planner.tables if not table.config.follow}
    check_shards(run / SHARDS_FILE, own, _ADVICE)
    start.check_fits(identity, _ADVICE)
    goal = None if behind is None else behind.loader
    return Past(config, None if before is None else before.folder, start, goal, order, planner)


def samples_of_step(
    run: Path,
    step: int,
    *,
    lanes: Sequence[int] | None = None,
    verify: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Provenance:
    """The samples of optimizer step `step` (1 is the first, as in `metrics.jsonl`).

    Args:
        run: the run folder; its shards must be where the config says. lanes: of these only; None: of all.
        verify: go on planning up to the next checkpoint and compare the digest chains.
        on_progress: called as (lanes done, lanes).

    Raises:
        CheckpointError, ConfigError: as `open_past`; no such lane.
        DataError: a shard is gone or has changed; the chains differ.
    """
    past = open_past(run, step)
    config, planner, start = past.config, past.planner, past.start
    numbers = _lanes(lanes, config.batches.num_lanes)
    goal = past.goal if verify else None
    bad = left_out_at(run, step)
    samples: list[UsedSample] = []
    per_lane = config.batches.rows_per_lane
    for done, lane in enumerate(numbers, start=1):
        reader = LaneReader(past.order, planner, config.run.seed, start.lanes[lane])
        for number in range(start.step, step if goal is None else goal.step):
            for place in range(per_lane):
                row = reader.next_row(number)
                if number == step - 1:
                    samples += _used(row, lane, lane * per_lane + place, planner, bad)
        if goal is not None and reader.cursor.chain != goal.lanes[lane].chain:
            raise DataError(
                f"{run}: lane {lane} planned from step {start.step} does not reach the digest of checkpoint "
                f"{goal.step}: weights, tokenizer or filters were others when it was trained; --no-verify lists the "
                "samples all the same"
            )
        on_progress(done, len(numbers))
    return Provenance(str(run), step, start.step, None if goal is None else goal.step, samples)


def reaches_goal(past: Past, state: LoaderState) -> bool | None:
    """Whether the lanes, planned on from `state`, come to the digest chains of the checkpoint behind; None: there is
    none."""
    if past.goal is None:
        return None
    for lane, cursor in state.lanes.items():
        reader = LaneReader(past.order, past.planner, past.config.run.seed, cursor)
        for number in range(state.step, past.goal.step):
            for _ in range(past.config.batches.rows_per_lane):
                reader.next_row(number)
        if reader.cursor.chain != past.goal.lanes[lane].chain:
            return False
    return True


def _checkpoints_around(run: Path, step: int) -> tuple[Path | None, Path | None]:
    """The newest checkpoint before the step, and the oldest that has it behind it."""
    found = step_folders(run / "checkpoints")
    steps = {number: path for number, path in found.items() if incomplete_reason(path) is None}
    if step < 1:
        raise ConfigError(f"--step: expected 1 or more, as in metrics.jsonl, got {step}")
    last = max([_last_step(run), *steps], default=0)
    if step > last:
        raise ConfigError(f"--step: the run {run} has done {last} steps, got {step}")
    before = max((number for number in steps if number < step), default=None)
    behind = min((number for number in steps if number >= step), default=None)
    return (None if before is None else steps[before]), (None if behind is None else steps[behind])


def _last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((int(json.loads(line)["step"]) for line in lines[-10:]), default=0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def run_tokenizer(run: Path, config: RunConfig) -> TextTokenizer:
    """The copy in the run folder, else the config's own."""
    copy = run / TOKENIZER_FOLDER
    return load_tokenizer(str(copy) if (copy / "tokenizer.json").exists() else config.batches.tokenizer)


def _planner(run: Path, config: RunConfig) -> SamplePlanner:
    tokenizer = run_tokenizer(run, config)
    tables = open_sources(config.shards, run / FOLLOW_FOLDER)
    return SamplePlanner(
        tables, config.samples, config.batches, tokenizer, item_lengths(config), config.shards.max_member_bytes
    )


def _lanes(asked: Sequence[int] | None, num_lanes: int) -> list[int]:
    wrong = [lane for lane in asked or () if not 0 <= lane < num_lanes]
    if wrong:
        raise ConfigError(f"--lane: the run has lanes 0 to {num_lanes - 1}, got {wrong[0]}")
    return list(range(num_lanes)) if not asked else sorted(set(asked))


def _used(
    row: LaneRow, lane: int, number: int, planner: SamplePlanner, bad: dict[tuple[str, str], str]
) -> list[UsedSample]:
    return [
        UsedSample(
            lane,
            number,
            planner.tables[sample.ref.source].name,
            sample.ref.epoch,
            sample.shard,
            sample.key,
            sample.length,
            bad.get((sample.shard, sample.key), ""),
        )
        for sample in row.samples
    ]


def left_out_at(run: Path, step: int) -> dict[tuple[str, str], str]:
    """(shard, key) -> reason of the samples that turned out bad when this step was decoded."""
    try:
        lines = (run / "quarantine.jsonl").read_text().splitlines()
    except OSError:
        return {}
    records = [json.loads(line) for line in lines if line.strip()]
    return {(r["shard"], r["key"]): r["reason"] for r in records if r.get("step") == step}
