"""The story of replay: a past step done again in one process, from the nearest kept checkpoint before it.

The loss of a step depends on the weights before it, so the steps between the checkpoint and it are done again too. On
one process sums are added up in another order than on the ranks of the run: right behind a checkpoint the loss is
equal to rounding (1e-5 in fp32); the difference grows with the steps in between.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trichord.assembly import build_loader, build_stepper, slot_layout, take_initial_weights
from trichord.batches.lane_reader import LaneReader
from trichord.batches.loader import Loader, LoaderState, StepBatch
from trichord.batches.packed_batch import PackedBatch
from trichord.checkpoints.load import find_step, load_into
from trichord.config.run import RunConfig
from trichord.core.dist import rank_facts
from trichord.core.errors import ConfigError
from trichord.core.seed import derive_seed
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import build_engine, set_rates, start_process_group
from trichord.fusion.model import Trichord
from trichord.objectives.combine import total_loss
from trichord.provenance import Past, left_out_at, open_past, reaches_goal, run_tokenizer
from trichord.restore import build_from_config, training_lengths
from trichord.tracking.metrics import merge_steps, read_events, read_metrics

TOLERANCE = {"fp32": 1e-5}
LOW_PRECISION_TOLERANCE = 2e-2
_COUNTED = {"samples": "train/samples_seen", "useful_tokens": "train/tokens_seen"}
_NO_COUNTS = {"samples": 0.0, "bad_samples": 0.0, "filtered": 0.0, "stop": 0.0}


@dataclass(frozen=True)
class RebuiltBatch:
    """The batch of a step, decoded again. digest: BLAKE2b of all its tensors, equal wherever the same data, config and
    library versions are; samples, useful_tokens, left_out: counts.

    verified_by: step of the checkpoint that the planned order was compared with; None: there is none behind the step.
    recorded_samples, recorded_useful_tokens: by `metrics.jsonl`; None where the step or the one before was not logged.
    differences: from what the run has recorded, empty where there is none.
    """

    run: str
    step: int
    samples: int
    useful_tokens: int
    left_out: int
    digest: str
    verified_by: int | None
    recorded_samples: int | None
    recorded_useful_tokens: int | None
    differences: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """equal, differs, or nothing to compare with."""
        if self.differences:
            return "differs"
        compared = (self.verified_by, self.recorded_samples, self.recorded_useful_tokens)
        return "nothing to compare with" if all(fact is None for fact in compared) else "equal"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class Replay:
    """A step done again. replayed_from: step of the checkpoint, 0 for fresh weights. recorded_*: what `metrics.jsonl`
    says, NaN where that was not finite; None where that step was not logged. limit: what the loss may differ by,
    relative."""

    run: str
    step: int
    replayed_from: int
    loss: float
    grad_norm: float
    losses: dict[str, float]
    recorded_loss: float | None
    recorded_grad_norm: float | None
    limit: float

    @property
    def difference(self) -> float | None:
        """Of the loss, relative to the recorded one; None where either is not there or not finite."""
        if self.recorded_loss is None or not (math.isfinite(self.loss) and math.isfinite(self.recorded_loss)):
            return None
        return abs(self.loss - self.recorded_loss) / max(abs(self.recorded_loss), 1e-30)

    @property
    def verdict(self) -> str:
        """equal, both not finite, differs, or nothing to compare with."""
        if self.recorded_loss is None:
            return "nothing to compare with"
        if self.difference is None:
            return "differs" if math.isfinite(self.loss) or math.isfinite(self.recorded_loss) else "both not finite"
        return "equal" if self.difference <= self.limit else "differs"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.difference, "verdict": self.verdict}


def rebuild_batch(run: Path, step: int) -> RebuiltBatch:
    """Plan up to the step, then read and decode its samples alone; compare with what the run has recorded.

    Compared are the planned order with the digest chains of the next checkpoint, the samples and tokens of the step
    with `metrics.jsonl`, and the samples left out with `quarantine.jsonl`. No digest of pixels and waves is recorded.

    Raises:
        CheckpointError, ConfigError: as `open_past`. DataError: a shard is gone, has changed, or cannot be read.
    """
    past = open_past(run, step)
    config = _alone(past.config)
    before = _state_before(past, step)
    reached = reaches_goal(past, before)
    with torch.device("meta"):  # only lengths are asked of it
        model = build_from_config(config, run_tokenizer(run, config), random_weights=False)
    loader = _open_loader(run, config, model, before)
    batch = next(iter(loader))
    loader.close()
    stats = batch.stats
    found = {"samples": stats.samples, "useful_tokens": stats.useful_tokens}
    recorded = {name: _count_of_step(run, metric, step) for name, metric in _COUNTED.items()}
    differences = [
        f"{found[name]} {name.replace('_', ' ')}, recorded are {count}"
        for name, count in recorded.items()
        if count is not None and count != found[name]
    ]
    goal = None if past.goal is None else past.goal.step
    if reached is False:
        differences.insert(0, f"the planned order does not reach the digest of checkpoint {goal}")
    left_out = {(record.shard, record.key) for record in stats.records}
    if left_out != (known := left_out_at(run, step).keys()):
        differences.append(f"{len(left_out)} samples left out, quarantine.jsonl has {len(known)}, or others")
    return RebuiltBatch(
        *(str(run), step, stats.samples, stats.useful_tokens, stats.bad_samples, _digest(batch)),
        verified_by=goal,
        recorded_samples=recorded["samples"],
        recorded_useful_tokens=recorded["useful_tokens"],
        differences=tuple(differences),
    )


def replay_step(run: Path, step: int, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Replay:
    """Do the steps from the nearest checkpoint on again, the wanted one included. Nothing is written.

    Args:
        run: the run folder. step: 1 is the first. on_progress: called as (steps done, steps).

    Raises:
        CheckpointError, ConfigError: as `open_past`. DataError: a shard is gone, has changed, or cannot be read.
    """
    past = open_past(run, step)
    config, first = _alone(past.config), past.start.step
    _, device = start_process_group(config.engine.timeout_s)
    torch.manual_seed(derive_seed(config.run.seed, "weights"))
    fresh = past.checkpoint is None
    model = build_from_config(config, run_tokenizer(run, config), random_weights=fresh)
    if fresh:
        take_initial_weights(model, config)
    prepare_blocks(model, config.engine)
    loader = _open_loader(run, config, model, past.start)
    layout = slot_layout(config, 1)
    engine = build_engine(
        model, config.engine, micro_rows=config.batches.micro_rows, grad_accum_steps=layout.num_micro_batches
    )
    if past.checkpoint is not None:
        load_into(engine, past.checkpoint)
    stepper = build_stepper(config, engine, device, layout)
    result, rewinds = None, rewinds_of(run)
    for number, batch in zip(range(first, step), loader):
        if (back := rewinds.get(number)) is not None and number > first:
            load_into(engine, find_step(run / "checkpoints", back))
        set_rates(engine, config.engine, number, config.run.max_steps or 0)
        result = stepper.run(batch.micro_batches, _NO_COUNTS)
        on_progress(number + 1 - first, step - first)
    loader.close()
    assert result is not None
    if result.is_empty:
        raise ConfigError(f"--step: step {step} of {run} held not one sample, so it had no loss and changed nothing")
    losses = {name: float(value) for name, value in result.losses.items()}
    return Replay(
        *(str(run), step, first, total_loss(config.objectives, losses), result.grad_norm, losses),
        recorded_loss=_recorded(run, step, "train/loss"),
        recorded_grad_norm=_recorded(run, step, "train/grad_norm"),
        limit=replay_limit(config, step - first),
    )


def replay_limit(config: RunConfig, steps: int) -> float:
    """What the loss may differ by, relative: rounding, once for each step that is done again."""
    return TOLERANCE.get(config.engine.precision, LOW_PRECISION_TOLERANCE) * steps


def rewinds_of(run: Path) -> dict[int, int]:
    """Step after which the run went back -> step of the checkpoint; without those of steps that were done again."""
    found: dict[int, int] = {}
    for event in read_events(run):
        if event["kind"] == "start":
            found = {step: back for step, back in found.items() if step <= event["step"]}
        elif event["kind"] == "rewind":
            found[event["step"]] = event["to_step"]
    return found


def _alone(config: RunConfig) -> RunConfig:
    """As one process does it: it reads by itself, and shares its rows with nobody."""
    batches = config.batches.model_copy(update={"num_workers": 0})
    engine = config.engine.model_copy(update={"sequence_parallel": 1})
    return config.model_copy(update={"batches": batches, "engine": engine})


def _open_loader(run: Path, config: RunConfig, model: Trichord, state: LoaderState) -> Loader:
    """All lanes."""
    return build_loader(config, training_lengths(config, model), run, rank_facts(), state)


def _state_before(past: Past, step: int) -> LoaderState:
    """The loader between steps `step` - 1 and `step`: planned, nothing read."""
    cursors = {}
    for lane, cursor in past.start.lanes.items():
        reader = LaneReader(past.order, past.planner, past.config.run.seed, cursor)
        for number in range(past.start.step, step - 1):
            for _ in range(past.config.batches.rows_per_lane):
                reader.next_row(number)
        cursors[lane] = reader.cursor
    return LoaderState(step - 1, cursors, past.start.data, past.start.left_out)


def _digest(batch: StepBatch) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for micro in batch.micro_batches:
        for name, tensor in _tensors(micro):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _tensors(batch: PackedBatch) -> Iterator[tuple[str, Tensor]]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _recorded(run: Path, step: int, name: str) -> float | None:
    """What `metrics.jsonl` says of a step; None where it was not logged. It has null for what was not finite: NaN."""
    rows = [row for row in merge_steps(read_metrics(run)) if row["step"] == step]
    if not rows or name not in rows[0]:
        return None
    return math.nan if rows[0][name] is None else rows[0][name]


def _count_of_step(run: Path, name: str, step: int) -> int | None:
    """What one step has added to a count that the record sums up; None where it or the step before was not logged."""
    before = 0 if step == 1 else _recorded(run, step - 1, name)
    after = _recorded(run, step, name)
    return None if before is None or after is None else int(after - before)
