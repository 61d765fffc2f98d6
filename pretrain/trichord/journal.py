"""What a run writes down while it goes: its progress, and a line of metrics every few steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from trichord.batches.loader import StepBatch, StepStats
from trichord.checkpoints.load import LoadedState
from trichord.config.identity import RunFolder
from trichord.config.run import RunConfig
from trichord.core.errors import DataError, TrichordError
from trichord.core.log import get_logger
from trichord.engine.step import StepResult
from trichord.engine.together import gather_lists
from trichord.objectives.combine import total_loss
from trichord.shards.quarantine import QuarantineLog, QuarantineRecord, check_bad_fraction
from trichord.tracking.data_record import DataRecord
from trichord.tracking.recorder import Recorder, Window

log = get_logger(__name__)

MAX_EMPTY_STEPS = 10


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
        self.empty_in_a_row = 0 if result.counts["samples"] else self.empty_in_a_row + 1

    def check(self, config: RunConfig, batch: StepBatch, recorder: Recorder) -> None:
        """Stop the run when too much data is bad, none is left, or too many steps were not finite; the same on all
        ranks."""
        check_bad_fraction(self.bad_samples, self.samples_seen + self.bad_samples, config.shards, batch.stats.records)
        if self.empty_in_a_row >= MAX_EMPTY_STEPS:
            raise DataError(
                f"the last {self.empty_in_a_row} steps held not one sample; so far {self.samples_seen} were used, "
                f"filters left out {self.filtered_samples}, {self.bad_samples} were bad; `trichord data preview` "
                "says why; or, where all sources have `epochs`, these are used up: lower run.max_steps"
            )
        if self.skipped_in_a_row:
            ids = [sample for micro in batch.micro_batches for sample in micro.sample_ids.tolist()][:64]
            recorder.event("skipped_step", self.step, samples_of_rank_0=ids)
        if self.skipped_in_a_row >= config.engine.max_bad_steps:
            raise TrichordError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient (the last is {self.step}); "
                "the weights are those before them. Lower engine.lr, or look at the samples named in events.jsonl"
            )


class Recording:
    """Turns steps into log lines every `log_every_steps`; between them nothing is read from the device."""

    def __init__(self, config: RunConfig, recorder: Recorder, device: torch.device, folder: RunFolder, step: int):
        """step: steps taken so far."""
        self.every = config.tracking.log_every_steps
        self.objectives = config.objectives
        self.names = [source.name for source in config.shards.sources]
        self.recorder = recorder
        self.device = device
        self.quarantine = QuarantineLog(folder.path / "quarantine.jsonl")
        self.data = DataRecord(folder.path / "data.json", step if folder.kind == "resume" else 0)
        self.window = Window()
        self._told: set[str] = set()

    def damaged(self, records: list[QuarantineRecord]) -> None:
        """Shards that cannot be read to their end; known alike on all ranks."""
        if dist.get_rank() == 0:
            self.quarantine.append(records)
        for record in records:
            log.warning("source %s: %s: %s", record.source, record.shard, record.reason)

    def step(self, progress: Progress, result: StepResult, batch: StepBatch, *, lr: float, wait_s: float) -> None:
        """Called after every step on every rank."""
        if result.counts["bad_samples"] > 0:  # known to all ranks, so all take part
            records = gather_lists([replace(record, step=progress.step) for record in batch.stats.records])
            if dist.get_rank() == 0:
                self.quarantine.append(records)
        stats = batch.stats
        counts = {
            name: result.counts[name] for name in ("useful_tokens", "slots", "samples", "bad_samples", "filtered")
        }
        per_source = {f"source/{name}": n for name, n in stats.samples_per_source.items()}
        self.window.add({**counts, **result.seconds, **per_source, "wait": wait_s})
        per_shard = stats.samples_per_shard
        self.data.add(samples_per_source=stats.samples_per_source, samples_per_shard=per_shard, filtered=stats.filtered)
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
        own = [result.losses[name] for name in names]
        draws = [self.window.sums.get(f"source/{name}", 0.0) for name in self.names]
        costs = torch.zeros(2, dist.get_world_size(), dtype=torch.float32, device=self.device)
        costs[:, dist.get_rank()] = torch.tensor([stats.cost, stats.cost_undealt])
        shares = torch.stack([*own, *torch.tensor(draws, dtype=torch.float32, device=self.device)])
        sums = torch.cat([shares, costs.flatten()])
        dist.all_reduce(sums)
        values = sums.tolist()  # the one read of metrics from the device
        losses, draws = dict(zip(names, values)), values[len(names) : len(shares)]
        line = self._line(progress, result, losses, draws, lr)
        dealt, undealt = torch.tensor(values[len(shares) :]).view(2, -1)
        line |= {"data/imbalance": _imbalance(dealt), "data/imbalance_undealt": _imbalance(undealt)}
        self.recorder.metrics(progress.step, line)
        self.window = Window()

    def _line(
        self, progress: Progress, result: StepResult, losses: dict[str, float], draws: list[float], lr: float
    ) -> dict[str, float]:
        window = self.window
        sums, seconds = window.sums, window.seconds
        line = {f"train/loss/{name}": value for name, value in losses.items()}
        line |= {
            "train/loss": total_loss(self.objectives, losses),
            "train/grad_norm": result.grad_norm,
            "train/lr": lr,
            "train/tokens_seen": progress.tokens_seen,
            "train/samples_seen": progress.samples_seen,
            "speed/tokens_per_s": sums["useful_tokens"] / seconds,
            "speed/samples_per_s": sums["samples"] / seconds,
            "speed/step_ms": 1000 * seconds / window.steps,
            "data/wait_ms": window.mean_ms("wait"),
            "speed/features_ms": window.mean_ms("features"),
            "speed/forward_backward_ms": window.mean_ms("forward_backward"),
            "speed/update_ms": window.mean_ms("update"),
            "data/useful_tokens_frac": sums["useful_tokens"] / max(1.0, sums["slots"]),
            "data/bad_samples": progress.bad_samples,
            "data/filtered_samples": progress.filtered_samples,
            "memory/peak_gib": _peak_memory_gib(self.device),
        }
        total = max(1.0, sum(draws))
        return line | {f"data/mix_frac/{name}": count / total for name, count in zip(self.names, draws)}


def _imbalance(costs: Tensor) -> float:
    """The most loaded rank over the mean, by predicted cost; 1 is balance."""
    total = float(costs.sum())
    return float(costs.max()) * len(costs) / total if total else 1.0


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the device's allocator on a GPU, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
