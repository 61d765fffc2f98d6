"""What a run writes down while it goes: its progress, and what it measures, a line of metrics every few steps.

Between two lines nothing is read from the device and no collective is made: host numbers are added up here, losses by
source on the device. At a line, one all-reduce carries everything that is known to a rank alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import StepBatch, StepStats
from trichord.checkpoints.load import LoadedState
from trichord.config.identity import RunFolder, run_path
from trichord.config.run import RunConfig
from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.engine.label_losses import KINDS, loss_names
from trichord.engine.param_groups import rates_of_rooms
from trichord.engine.rank_figures import figures_of_ranks, rank_columns
from trichord.engine.step import Stepper, StepResult
from trichord.engine.together import gather_lists
from trichord.engine.wire import MIB, wire_meter
from trichord.engine.work import WorkMeter
from trichord.fusion.model import Trichord
from trichord.objectives.combine import total_loss
from trichord.shards.quarantine import QuarantineLog, QuarantineRecord, check_bad_fraction
from trichord.shards.shares import target_shares
from trichord.tracking.data_record import DataRecord
from trichord.tracking.peak import number_of, peak_flops_per_s
from trichord.tracking.profile import StepProfiler
from trichord.tracking.recorder import Recorder, Window

log = get_logger(__name__)

MAX_EMPTY_STEPS = 10
MAX_SUSPECTS = 64
# Metric -> parts of the step as `StepClock` names them.
_TIMES = {
    "data/wait_ms": ("data wait",),
    "speed/features_ms": ("count", "features", "contrast"),
    "speed/forward_ms": ("forward",),
    "speed/backward_ms": ("backward",),
    "speed/update_ms": ("update",),
    "speed/save_ms": ("save",),
}


@dataclass
class Progress:
    """Where the run stands: equal on all ranks, part of every checkpoint."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    filtered_samples: int = 0
    skipped_in_a_row: int = 0
    empty_in_a_row: int = 0
    rewinds: int = 0
    rewound_to: int | None = None  # until a step is finite again

    @classmethod
    def after(cls, resumed: LoadedState | None) -> Progress:
        return cls(**resumed.train_state["progress"]) if resumed is not None else cls()

    def advance(self, result: StepResult) -> None:
        self.step += 1
        self.tokens_seen += int(result.counts["useful_tokens"])
        self.samples_seen += int(result.counts["samples"])
        self.bad_samples += int(result.counts["bad_samples"])
        self.filtered_samples += int(result.counts["filtered"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        self.rewound_to = self.rewound_to if result.skipped else None
        self.empty_in_a_row = 0 if result.counts["samples"] else self.empty_in_a_row + 1

    @property
    def is_finite(self) -> bool:
        """The last step was, with the weights that the run now has."""
        return not self.skipped_in_a_row and self.rewound_to is None

    def check(self, config: RunConfig, batch: StepBatch, result: StepResult, recorder: Recorder) -> None:
        """Stop the run when too much data is bad or none is left, and say which step was not finite; the same on all
        ranks."""
        check_bad_fraction(self.bad_samples, self.samples_seen + self.bad_samples, config.shards, batch.stats.records)
        if self.empty_in_a_row >= MAX_EMPTY_STEPS:
            raise DataError(
                f"the last {self.empty_in_a_row} steps held not one sample; so far {self.samples_seen} were used, "
                f"filters left out {self.filtered_samples}, {self.bad_samples} were bad; `trichord data preview` "
                "says why; or, where all sources have `epochs`, these are used up: lower run.max_steps"
            )
        if self.skipped_in_a_row:
            suspects = suspects_of(result, batch)
            if dist.get_rank() == 0:
                log.warning(
                    "step %d is skipped, its loss or gradient is not finite%s; its samples: `trichord provenance %s "
                    "--step %d`",
                    *(self.step, told_ranks(suspects["ranks_with_bad_loss"]), run_path(config), self.step),
                )
            recorder.event("skipped_step", self.step, **suspects)

    def went_back(self, step: int) -> None:
        """To the weights of a checkpoint, see `train.rewind`."""
        self.rewinds, self.rewound_to, self.skipped_in_a_row = self.rewinds + 1, step, 0


def suspects_of(result: StepResult, batch: StepBatch) -> dict[str, Any]:
    """Which ranks' own loss was not finite in a skipped step, and the samples they had; where it was finite on all,
    only the gradient was not, and samples of all ranks are named. Called on every rank; reads the device.

    Samples are (source number, epoch, number in the source), as in `PackedBatch.sample_ids`; at most 64 in all.
    """
    finite = all(bool(torch.isfinite(loss)) for loss in result.losses.values())
    ids = [tuple(sample) for micro in batch.micro_batches for sample in micro.sample_ids.tolist()]
    found = gather_lists([(dist.get_rank(), finite, ids[: MAX_SUSPECTS if not finite else 4])])
    bad = [part for part in found if not part[1]]
    return {
        "ranks_with_bad_loss": [rank for rank, _, _ in bad],
        # Ranks that share rows have the same ones.
        "samples": [list(sample) for sample in dict.fromkeys(s for *_, samples in bad or found for s in samples)][
            :MAX_SUSPECTS
        ],
    }


def told_ranks(ranks: list[int]) -> str:
    return f" (the loss was not on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))})" if ranks else ""


class Recording:
    """Turns steps into log lines every `log_every_steps`."""

    def __init__(
        self,
        config: RunConfig,
        recorder: Recorder,
        stepper: Stepper,
        folder: RunFolder,
        step: int,
        model: Trichord,
    ) -> None:
        """step: steps taken so far."""
        self.config = config
        self.every = config.tracking.log_every_steps
        self.names = [source.name for source in config.shards.sources]
        self.recorder, self.clock, self.device = recorder, stepper.clock, stepper.device
        self.quarantine = QuarantineLog(folder.path / "quarantine.jsonl")
        self.data = DataRecord(folder.path / "data.json", step if folder.kind == "resume" else 0)
        self.window = Window()
        self.work = WorkMeter(
            *(model, config.engine, config.objectives.contrastive),
            slots=stepper.layout.slots,
            micro_batches=stepper.layout.num_micro_batches,
            world_size=stepper.world_size,
        )
        self._label_sums = torch.zeros(len(self.names), len(KINDS), 2, dtype=torch.float64, device=self.device)
        self._peak = _peak_flops_per_s(config, self.device)
        self._told: set[str] = set()
        self.profiler = StepProfiler(
            config.tracking.profile, folder.path / "profile", rank=dist.get_rank(), attempt=folder.attempt
        )
        wire_meter().read()  # what start-up sent is no step's

    def damaged(self, records: list[QuarantineRecord]) -> None:
        """Shards that cannot be read to their end; known alike on all ranks."""
        if dist.get_rank() == 0:
            self.quarantine.append(records)
        for record in records:
            log.warning("source %s: %s: %s", record.source, record.shard, record.reason)

    def begin(self, step: int) -> None:
        """A step begins, after `step` finished ones: the wait for its data."""
        if (trace := self.profiler.begin(step)) is not None:
            self.recorder.event("profile", step, trace=str(trace))
        self.clock.enter("data wait")

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """What happens in here is no part of a step: its time and its bytes are left out of the next line."""
        self.clock.enter(what)
        sent, began = wire_meter().read(), time.monotonic()
        try:
            yield
        finally:
            wire_meter().read()
            wire_meter().sent.update(sent)
            self.window.started += time.monotonic() - began

    def close(self, step: int) -> None:
        """No more steps."""
        if (trace := self.profiler.close()) is not None:
            self.recorder.event("profile", step, trace=str(trace))

    def step(self, progress: Progress, result: StepResult, batch: StepBatch, *, lr: float) -> None:
        """Called after every step on every rank."""
        self.clock.enter("record")
        if result.counts["bad_samples"] > 0:  # known to all ranks, so all take part
            records = gather_lists([replace(record, step=progress.step) for record in batch.stats.records])
            if dist.get_rank() == 0:
                self.quarantine.append(records)
        stats = batch.stats
        counts = {name: result.counts[name] for name in ("useful_tokens", "slots", "samples")}
        per_source = {f"source/{name}": n for name, n in stats.samples_per_source.items()}
        self.window.add({**counts, **per_source})
        self.work.add(batch.micro_batches)
        if result.label_sums is not None:
            self._label_sums += result.label_sums
        per_shard = stats.samples_per_shard
        self.data.add(samples_per_source=stats.samples_per_source, samples_per_shard=per_shard, filtered=stats.filtered)
        self.recorder.advance(progress.step)
        if progress.step % self.every == 0:
            self._log(progress, result, batch.stats, lr)

    def checkpoint(self, step: int) -> None:
        """Bring `data.json` up to the checkpoint that is being saved; called on every rank."""
        counts = gather_lists([self.data.own()])
        if dist.get_rank() == 0:
            unseen = self.data.write(step, counts)
            for name in sorted(set(self.names) & unseen - self._told):
                log.warning(
                    "source %s has given no sample up to step %d; data.json says what filters left out", name, step
                )
            self._told |= unseen

    def _log(self, progress: Progress, result: StepResult, stats: StepStats, lr: float) -> None:
        names = sorted(result.losses)
        own = [
            torch.stack([result.losses[name].double() for name in names]),
            torch.tensor([self.window.sums.get(f"source/{name}", 0.0) for name in self.names], dtype=torch.float64),
            torch.tensor(self.work.read(), dtype=torch.float64),
            self._label_sums.flatten(),
            rank_columns(stats, self.device).flatten(),
        ]
        sums = torch.cat([part.to(self.device) for part in own])
        dist.all_reduce(sums)
        losses, draws, work, labels, columns = sums.cpu().split([len(part) for part in own])  # the one read of a line
        seconds, steps = self.window.seconds, self.window.steps
        found = dict(zip(names, losses.tolist()))
        line = {f"train/loss/{name}": value for name, value in found.items()}
        line["train/loss"] = total_loss(self.config.objectives, found)
        line |= loss_names(labels.view(self._label_sums.shape), self.names)
        line |= self._state(progress, result, lr)
        line |= self._speed(seconds, *work.tolist()) | self._times(seconds, steps) | _wire(steps)
        line |= self._mix(progress.step, draws.tolist())
        line |= figures_of_ranks(columns)
        self.recorder.metrics(progress.step, line)
        self.window = Window()
        self._label_sums.zero_()

    def _state(self, progress: Progress, result: StepResult, lr: float) -> dict[str, float]:
        config, total = self.config, self.config.run.max_steps or 0
        rooms = rates_of_rooms(config.engine, progress.step - 1, total)
        return {
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            **{f"train/lr/{room}": rate for room, rate in rooms.items()},
            "train/tokens_seen": progress.tokens_seen,
            "train/samples_seen": progress.samples_seen,
            "data/bad_samples": progress.bad_samples,
            "data/filtered_samples": progress.filtered_samples,
        }

    def _speed(self, seconds: float, needed: float, executed: float) -> dict[str, float]:
        sums = self.window.sums
        line = {
            "speed/tokens_per_s": sums["useful_tokens"] / seconds,
            "speed/samples_per_s": sums["samples"] / seconds,
            "data/useful_tokens_frac": sums["useful_tokens"] / max(1.0, sums["slots"]),
        }
        if needed:
            line["speed/flops_per_s"] = needed / seconds
            if self._peak is not None:
                most = self._peak * dist.get_world_size() * seconds
                line |= {"speed/mfu_frac": needed / most, "speed/hfu_frac": executed / most}
        return line

    def _times(self, seconds: float, steps: int) -> dict[str, float]:
        parts = self.clock.read()
        line = {"speed/step_ms": 1000.0 * seconds / steps}
        return line | {name: 1000.0 * sum(parts.get(part, 0.0) for part in of) / steps for name, of in _TIMES.items()}

    def _mix(self, step: int, draws: list[float]) -> dict[str, float]:
        total = max(1.0, sum(draws))
        line = {f"data/mix_frac/{name}": count / total for name, count in zip(self.names, draws)}
        target = target_shares(self.config.shards, step)
        return line | {f"data/mix_target_frac/{name}": share for name, share in target.items()}


def _wire(steps: int) -> dict[str, float]:
    """MiB that this rank sent per step, in all and by kind of collective."""
    sent = {kind: size / MIB / steps for kind, size in sorted(wire_meter().read().items())}
    return {"comm/wire_mib": sum(sent.values())} | {f"comm/wire_mib/{kind}": size for kind, size in sent.items()}


def _peak_flops_per_s(config: RunConfig, device: torch.device) -> float | None:
    """Of one GPU, in the numbers this run computes in; None on a CPU, or where it is not known."""
    if config.tracking.peak_tflops is not None:
        return config.tracking.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    number = number_of(config.engine.precision, allow_tf32=bool(torch.backends.cuda.matmul.allow_tf32))
    name = torch.cuda.get_device_name(device)
    peak = peak_flops_per_s(name, number)
    if peak is None and dist.get_rank() == 0:
        log.warning("no peak FLOP/s known of %s in %s: no MFU; set tracking.peak_tflops", name, number)
    return peak
