"""The story of replay: a past step done again in one process, from the nearest kept checkpoint before it.

The loss of a step depends on the weights before it, so the steps between the checkpoint and it are done again too. On
one process sums are added up in another order than on the ranks of the run: right behind a checkpoint the loss is
equal to rounding (1e-5 in fp32); the difference grows with the steps in between.
"""

from __future__ import annotations

import hashlib
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
from trichord.core.seed import derive_seed
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import build_engine, set_rates, start_process_group
from trichord.fusion.model import Trichord
from trichord.objectives.combine import total_loss
from trichord.provenance import Past, open_past, run_tokenizer
from trichord.restore import build_from_config, training_lengths
from trichord.tracking.metrics import merge_steps, read_events, read_metrics

_RECORDED = ("train/loss", "train/grad_norm")
_NO_COUNTS = {"samples": 0.0, "bad_samples": 0.0, "filtered": 0.0, "stop": 0.0}


@dataclass(frozen=True)
class RebuiltBatch:
    """The batch of a step, decoded again. digest: BLAKE2b of all its tensors, equal wherever the same data, config and
    library versions are; samples, useful_tokens, left_out: counts."""

    run: str
    step: int
    samples: int
    useful_tokens: int
    left_out: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Replay:
    """A step done again. replayed_from: step of the checkpoint, 0 for fresh weights. recorded_*: what `metrics.jsonl`
    says; None where that step was not logged."""

    run: str
    step: int
    replayed_from: int
    loss: float
    grad_norm: float
    losses: dict[str, float]
    recorded_loss: float | None
    recorded_grad_norm: float | None

    @property
    def difference(self) -> float | None:
        """Of the loss, relative to the recorded one."""
        if self.recorded_loss is None:
            return None
        return abs(self.loss - self.recorded_loss) / max(abs(self.recorded_loss), 1e-30)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"difference": self.difference}


def rebuild_batch(run: Path, step: int) -> RebuiltBatch:
    """Plan up to the step, then read and decode its samples alone.

    Raises:
        CheckpointError, ConfigError: as `samples_of_step`. DataError: a shard cannot be read.
    """
    past = open_past(run, step)
    config = _alone(past.config)
    with torch.device("meta"):  # only lengths are asked of it
        model = build_from_config(config, run_tokenizer(run, config), random_weights=False)
    loader = _open_loader(run, config, model, _state_before(past, step))
    batch = next(iter(loader))
    loader.close()
    return RebuiltBatch(
        str(run), step, batch.stats.samples, batch.stats.useful_tokens, batch.stats.bad_samples, _digest(batch)
    )


def replay_step(run: Path, step: int, *, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Replay:
    """Do the steps from the nearest checkpoint on again, the wanted one included. Nothing is written.

    Args:
        run: the run folder. step: 1 is the first. on_progress: called as (steps done, steps).

    Raises:
        CheckpointError, ConfigError: as `samples_of_step`. DataError: a shard cannot be read.
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
    losses = {name: float(value) for name, value in result.losses.items()}
    recorded = _recorded(run, step)
    return Replay(
        *(str(run), step, first, total_loss(config.objectives, losses), result.grad_norm, losses),
        recorded_loss=recorded.get("train/loss"),
        recorded_grad_norm=recorded.get("train/grad_norm"),
    )


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


def _recorded(run: Path, step: int) -> dict[str, float]:
    rows = [row for row in merge_steps(read_metrics(run)) if row["step"] == step]
    return {name: rows[0][name] for name in _RECORDED if rows and rows[0].get(name) is not None}
