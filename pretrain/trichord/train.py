"""The story of a run: each room is built in its order, then steps are taken until the end or a signal.

One loop serves pretraining, fine-tuning and the quick-start, on one process or a thousand.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import ItemLengths, Loader, LoaderState, StepBatch, count_steps
from trichord.checkpoints.load import LoadedState, find_resumable, find_step, load_into, read_facts
from trichord.checkpoints.save import CheckpointSaver, require_writable
from trichord.config.identity import RunFolder, prepare_run_folder, run_path, write_run_record
from trichord.config.run import RunConfig
from trichord.core.dist import rank_facts
from trichord.core.errors import EXIT_DONE, EXIT_STOPPED, EXIT_UNEXPECTED, ConfigError, TrichordError
from trichord.core.log import configure_logging, get_logger
from trichord.core.schedule import lr_multiplier
from trichord.core.seed import derive_seed
from trichord.core.status import Status, clear_rank_statuses, write_rank_status, write_status
from trichord.engine.build import apply_timeout, build_engine, set_lr, start_process_group
from trichord.engine.features import SlotLayout
from trichord.engine.step import Stepper, StepResult
from trichord.engine.together import decide_on_rank_0, gather_lists
from trichord.engine.watch import PeerWatch, StopFlag
from trichord.objectives.combine import total_loss
from trichord.restore import TOKENIZER_FOLDER, build_from_config, item_lengths
from trichord.shards.quarantine import QuarantineLog, QuarantineRecord, check_bad_fraction
from trichord.tracking.recorder import Recorder, Window

log = get_logger(__name__)


def run(config: RunConfig) -> int:
    """Train to the end, to a signal, or to an error, and leave the verdict in the run folder's status files.

    Returns:
        The exit code: 0 finished, 75 stopped on a signal with a checkpoint. Under torchrun 0 for both: it takes any
        other code of one rank for a crash and ends the rest; the verdict is in the status file.

    Raises:
        TrichordError: with its exit code, after the status was written.
    """
    stop = StopFlag().install()
    verdict = Verdict(run_path(config))
    try:
        code = train(config, stop, verdict)
        return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else code
    except BaseException as error:
        verdict.failed(error)
        raise


def train(config: RunConfig, stop: StopFlag, verdict: Verdict) -> int:
    """The rooms in their order, then the loop. Returns the exit code."""
    # The job, and the run it is part of.
    facts, device = start_process_group(config.engine.timeout_s)
    folder, start, token = decide_on_rank_0(lambda: open_run(config))
    verdict.begin(folder, start.step if start else 0)
    configure_logging(folder.path / "logs" / f"rank-{facts.rank:05d}.log")
    resumed = start if folder.kind != "fresh" else None

    # Shards, samples, batches.
    lengths = item_lengths(config)
    loader = build_loader(config, lengths, facts.rank, facts.world_size, resumed.loader if resumed else None)
    config = fix_length(config, lengths, folder)
    total_steps = config.run.max_steps or 0

    # Layers, encoders, fusion.
    torch.manual_seed(derive_seed(config.run.seed, "weights"))  # equal on all ranks, whatever the world size
    model = build_from_config(config, loader.tokenizer)
    if resumed is None and config.run.init_from is not None:
        from trichord.release.import_ import load_initial_weights

        load_initial_weights(model, config.run.init_from)

    if config.engine.activation_checkpointing:
        model.enable_activation_checkpointing()

    # Objectives, engine, checkpoints.
    layout = slot_layout(config, facts.world_size)
    engine = build_engine(
        model, config.engine, micro_rows=config.batches.micro_rows, grad_accum_steps=layout.num_micro_batches
    )
    if resumed is not None:
        load_into(engine, resumed.folder)
    stepper = Stepper(
        engine, config.objectives, device=device, layout=layout, max_grad_norm=config.engine.max_grad_norm
    )
    saver = CheckpointSaver(folder.path / "checkpoints", config.checkpoints, token)
    watch = PeerWatch(config.engine.heartbeat_timeout_s, verdict.lost).start()
    apply_timeout(config.engine.timeout_s)

    # Tracking, then the steps.
    progress = Progress.after(resumed)
    recorder = build_recorder(config, folder, resumed, facts.rank == 0)
    recorder.event("start", progress.step, kind_of_start=folder.kind, world_size=facts.world_size)
    recording = Recording(config, recorder, device, folder.path)
    if folder.kind == "fresh":
        recording.damaged(loader.damage_records)
    if facts.rank == 0:
        loader.tokenizer.save(folder.path / TOKENIZER_FOLDER)  # a checkpoint stays usable when the data has gone
    stopping = progress.step >= total_steps
    steps = iter(loader)
    while not stopping:
        waited = time.monotonic()
        batch: StepBatch = next(steps)
        wait_s = time.monotonic() - waited
        lr = config.engine.lr * lr_at(config, progress.step)
        set_lr(engine, lr)
        result = stepper.run(batch.micro_batches, local_counts(batch, stop))
        progress.advance(result)
        verdict.step = progress.step
        recording.step(progress, result, batch, lr=lr, wait_s=wait_s)
        progress.check(config, batch, recorder)
        stopping = result.counts["stop"] > 0 or progress.step >= total_steps
        if stopping or progress.step % config.checkpoints.save_every_steps == 0:
            saver.begin(engine, progress.step, train_state(config, progress, recorder), batch.state)
        if (saved := saver.poll()) is not None:
            recorder.event("checkpoint", saved)

    # The end: the last checkpoint is on disk before anybody leaves.
    saved = saver.finish()
    finished = progress.step >= total_steps
    code = EXIT_DONE if finished else EXIT_STOPPED
    recorder.event("end", progress.step, finished=finished, checkpoint_saved=saved)
    watch.stop()
    recorder.close(code)
    loader.close()
    verdict.ended(finished, saved, stop.name)
    dist.barrier()
    dist.destroy_process_group()
    return code


def open_run(config: RunConfig) -> tuple[RunFolder, LoadedState | None, str]:
    """On rank 0: the run folder, the checkpoint to go on from, and a name of this attempt that no other has."""
    folder = prepare_run_folder(config)
    require_writable(folder.path / "checkpoints")
    clear_rank_statuses(folder.path)
    start = None
    if folder.kind == "branch":
        assert folder.branch_folder is not None
        assert folder.branch_step is not None
        start = read_facts(find_step(folder.branch_folder / "checkpoints", folder.branch_step))
    elif folder.kind == "resume":
        latest = find_resumable(folder.path / "checkpoints")
        start = read_facts(latest) if latest is not None else None
    return folder, start, f"{folder.attempt}-{secrets.token_hex(4)}"


def build_loader(
    config: RunConfig, lengths: ItemLengths, rank: int, world_size: int, state: LoaderState | None
) -> Loader:
    return Loader(
        config.shards,
        config.samples,
        config.batches,
        seed=config.run.seed,
        lengths=lengths,
        rank=rank,
        world_size=world_size,
        state=state,
    )


def fix_length(config: RunConfig, lengths: ItemLengths, folder: RunFolder) -> RunConfig:
    """The config with `run.max_steps` set: counted, where only `epochs` are given, and written into the record."""
    if config.run.max_steps is not None:
        return config
    steps = decide_on_rank_0(
        lambda: count_steps(config.shards, config.samples, config.batches, seed=config.run.seed, lengths=lengths)
    )
    if steps == 0:
        raise ConfigError("the sources hold no usable sample, so the run would have no step; see quarantine.jsonl")
    fixed = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": steps})})
    if dist.get_rank() == 0:
        write_run_record(folder, fixed)
    return fixed


def slot_layout(config: RunConfig, world_size: int) -> SlotLayout:
    """Micro-steps per step, and sample slots per micro-step."""
    rows, micro_rows = config.batches.rows_per_step, config.batches.micro_rows
    return SlotLayout(micro_rows * config.batches.max_samples_per_row, math.ceil(rows / (world_size * micro_rows)))


def lr_at(config: RunConfig, step: int) -> float:
    engine = config.engine
    return lr_multiplier(
        engine.schedule,
        step,
        warmup_steps=engine.warmup_steps,
        total_steps=config.run.max_steps or 0,
        min_ratio=engine.min_lr_ratio,
    )


def local_counts(batch: StepBatch, stop: StopFlag) -> dict[str, float]:
    """What this rank adds to the step's count all-reduce besides tokens."""
    return {
        "samples": batch.stats.samples,
        "bad_samples": batch.stats.bad_samples,
        "stop": float(stop.is_set),
    }


def train_state(config: RunConfig, progress: Progress, recorder: Recorder) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "progress": asdict(progress),
        "seed": config.run.seed,
        "wandb_run_id": recorder.wandb_run_id,
        "config": config.model_dump(mode="json"),
    }


def build_recorder(config: RunConfig, folder: RunFolder, resumed: LoadedState | None, active: bool) -> Recorder:
    same_run = resumed is not None and folder.kind == "resume"
    return Recorder(
        folder.path,
        config.tracking,
        active=active,
        attempt=folder.attempt,
        resume_step=resumed.step if resumed is not None and same_run else None,
        total_steps=config.run.max_steps or 0,
        run_name=config.run.name,
        run_facts=config.model_dump(mode="json"),
        wandb_run_id=resumed.train_state.get("wandb_run_id") if resumed is not None and same_run else None,
    )


@dataclass
class Progress:
    """Where the run stands: equal on all ranks, part of every checkpoint."""

    step: int = 0
    tokens_seen: int = 0
    samples_seen: int = 0
    bad_samples: int = 0
    skipped_in_a_row: int = 0

    @classmethod
    def after(cls, resumed: LoadedState | None) -> Progress:
        return cls(**resumed.train_state["progress"]) if resumed is not None else cls()

    def advance(self, result: StepResult) -> None:
        self.step += 1
        self.tokens_seen += int(result.counts["useful_tokens"])
        self.samples_seen += int(result.counts["samples"])
        self.bad_samples += int(result.counts["bad_samples"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0

    def check(self, config: RunConfig, batch: StepBatch, recorder: Recorder) -> None:
        """Stop the run when too much data is bad or too many steps were not finite; the same on all ranks."""
        check_bad_fraction(self.bad_samples, self.samples_seen + self.bad_samples, config.shards, batch.stats.records)
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

    def __init__(self, config: RunConfig, recorder: Recorder, device: torch.device, folder: Path):
        self.every = config.tracking.log_every_steps
        self.objectives = config.objectives
        self.names = [source.name for source in config.shards.sources]
        self.recorder = recorder
        self.device = device
        self.quarantine = QuarantineLog(folder / "quarantine.jsonl")
        self.window = Window()

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
        counts = {name: result.counts[name] for name in ("useful_tokens", "slots", "samples", "bad_samples")}
        per_source = {f"source/{name}": n for name, n in batch.stats.samples_per_source.items()}
        self.window.add({**counts, **result.seconds, **per_source, "wait": wait_s})
        if progress.step % self.every == 0:
            self._log(progress, result, lr)

    def _log(self, progress: Progress, result: StepResult, lr: float) -> None:
        names = sorted(result.losses)
        own = [result.losses[name] for name in names]
        draws = [self.window.sums.get(f"source/{name}", 0.0) for name in self.names]
        shares = torch.stack([*own, *torch.tensor(draws, dtype=torch.float32, device=self.device)])
        dist.all_reduce(shares)
        values = shares.tolist()  # the one read of metrics from the device
        losses, draws = dict(zip(names, values)), values[len(names) :]
        self.recorder.metrics(progress.step, self._line(progress, result, losses, draws, lr))
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
            "memory/peak_gib": _peak_memory_gib(self.device),
        }
        total = max(1.0, sum(draws))
        return line | {f"data/mix_frac/{name}": count / total for name, count in zip(self.names, draws)}


def _peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the device's allocator on a GPU, the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Verdict:
    """Writes what became of the run: rank 0 the run's status, any failing rank its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.attempt = 0
        self.step = 0
        self.rank = rank_facts().rank
        self._begun = False  # until the folder is known to be ours, its status.json may be another run's

    def begin(self, folder: RunFolder, step: int) -> None:
        self.folder, self.attempt, self.step = folder.path, folder.attempt, step
        self._begun = True
        self._run("running", EXIT_DONE, "")

    def ended(self, finished: bool, saved: bool, signal_name: str) -> None:
        """The loop is over; without its last checkpoint the run has failed, whatever ended the loop."""
        if not saved:
            self._run("failed", EXIT_UNEXPECTED, f"the checkpoint of step {self.step} could not be written")
            raise TrichordError(f"the last checkpoint (step {self.step}) could not be written; see the log of rank 0")
        if finished:
            self._run("finished", EXIT_DONE, "all steps done")
        else:
            self._run("stopped", EXIT_STOPPED, f"stopped by {signal_name} with a checkpoint")

    def failed(self, error: BaseException) -> None:
        """An exception on this rank ends the run."""
        code = error.exit_code if isinstance(error, TrichordError) else EXIT_UNEXPECTED
        reason = str(error) if isinstance(error, TrichordError) else f"{type(error).__name__}: {error}"
        self._rank(code, reason)
        self._run("failed", code, reason)

    def lost(self, reason: str) -> None:
        """Called by the watcher's thread just before it leaves."""
        self._rank(EXIT_UNEXPECTED, reason)
        self._run("failed", EXIT_UNEXPECTED, reason)

    def _rank(self, code: int, reason: str) -> None:
        try:
            write_rank_status(self.folder, self.rank, self._status("failed", code, reason))
        except OSError as error:  # the folder itself may be what failed
            log.error("cannot write the status of this rank in %s: %s", self.folder, error)

    def _run(self, outcome: Any, code: int, reason: str) -> None:
        if self.rank == 0 and self._begun:
            write_status(self.folder, self._status(outcome, code, reason))

    def _status(self, outcome: Any, code: int, reason: str) -> Status:
        return Status(outcome, code, self.step, reason, self.attempt, time.time())
