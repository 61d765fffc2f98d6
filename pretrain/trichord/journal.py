"""What a run writes down while it goes: what it measures, a line of metrics every few steps.

Between two lines nothing is read from the device and no collective is made: host numbers are added up here, losses by
source on the device. At a line, one all-reduce carries everything that is known to a rank alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from trichord.batches.loader import LoaderState, StepBatch
from trichord.config.identity import RunFolder
from trichord.config.run import RunConfig
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
from trichord.progress import Progress
from trichord.shards.quarantine import QuarantineLog, QuarantineRecord
from trichord.shards.shares import target_shares
from trichord.tracking.data_record import DataRecord
from trichord.tracking.peak import number_of, peak_flops_per_s
from trichord.tracking.profile import StepProfiler
from trichord.tracking.recorder import Recorder, Window

log = get_logger(__name__)

# Metric -> parts of the step as `StepClock` names them.
_TIMES = {
    "data/wait_ms": ("data wait",),
    "speed/features_ms": ("count", "features", "contrast"),
    "speed/forward_ms": ("forward",),
    "speed/backward_ms": ("backward",),
    "speed/update_ms": ("update",),
    "speed/save_ms": ("save",),
}


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
        past: LoaderState | None = None,
    ) -> None:
        """step: steps taken so far; past: where the data stood then, None at the start."""
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
        lanes = [float(config.batches.num_lanes)] * len(self.names) if past is None else self._lanes_left(past)
        self._used_up = {name for name, left in zip(self.names, lanes) if not left}
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
            self._log(progress, result, batch, lr)

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

    def _log(self, progress: Progress, result: StepResult, batch: StepBatch, lr: float) -> None:
        names = sorted(result.losses)
        own = [
            *(result.losses[name].double().reshape(1) for name in names),
            torch.tensor([self.window.sums.get(f"source/{name}", 0.0) for name in self.names], dtype=torch.float64),
            torch.tensor(self.work.read(), dtype=torch.float64),
            self._label_sums.flatten(),
            rank_columns(batch.stats, self.device).flatten(),
            torch.tensor(self._lanes_left(batch.state), dtype=torch.float64),
        ]
        sums = torch.cat([part.to(self.device) for part in own])
        dist.all_reduce(sums)
        *losses, draws, work, labels, columns, left = sums.cpu().split(
            [len(part) for part in own]
        )  # the line's one read
        seconds, steps = self.window.seconds, self.window.steps
        line = self._losses(result, {name: float(loss) for name, loss in zip(names, losses)})
        line |= loss_names(labels.view(self._label_sums.shape), self.names)
        line |= self._state(progress, lr)
        line |= self._speed(seconds, *work.tolist()) | self._times(seconds, steps) | _wire(steps)
        line |= self._mix(progress.step, draws.tolist())
        line |= figures_of_ranks(columns)
        self.recorder.metrics(progress.step, line)
        self._tell_used_up(progress.step, left.tolist())
        self.window = Window()
        self._label_sums.zero_()

    def _losses(self, result: StepResult, found: dict[str, float]) -> dict[str, float]:
        """Of the step; none where it had no sample."""
        if result.is_empty:
            return {}
        line = {f"train/loss/{name}": value for name, value in found.items()}
        return line | {"train/loss": total_loss(self.config.objectives, found), "train/grad_norm": result.grad_norm}

    def _lanes_left(self, state: LoaderState) -> list[float]:
        """Of each source: the lanes of this state in which it still comes."""
        sources = self.config.shards.sources
        return [float(state.lanes_with(number, source.epochs)) for number, source in enumerate(sources)]

    def _tell_used_up(self, step: int, lanes: list[float]) -> None:
        for source, left in zip(self.config.shards.sources, lanes):
            if left or source.name in self._used_up:
                continue
            self._used_up.add(source.name)
            self.recorder.event("source_used_up", step, source=source.name, epochs=source.epochs)
            if dist.get_rank() == 0:
                times = "1 epoch" if source.epochs == 1 else f"{source.epochs} epochs"
                log.info("source %s is used up after %s, at step %d", source.name, times, step)

    def _state(self, progress: Progress, lr: float) -> dict[str, float]:
        config, total = self.config, self.config.run.max_steps or 0
        rooms = rates_of_rooms(config.engine, progress.step - 1, total)
        return {
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
