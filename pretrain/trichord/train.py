"""The story of a run: each room is built in its order, then steps are taken until the end or a signal.

One loop serves pretraining, fine-tuning and the quick-start, on one process or a thousand.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from trichord.batches.loader import ItemLengths, Loader, LoaderState, StepBatch, count_steps
from trichord.batches.tokenizer import load_tokenizer
from trichord.batches.transfer import move_ahead
from trichord.checkpoints.commit import put_back_replaced, require_writable
from trichord.checkpoints.load import LoadedState, find_resumable, find_step, load_into, read_facts, read_train_state
from trichord.checkpoints.mirror import fetch_newer, holds_checkpoints, mirror_of
from trichord.checkpoints.save import CheckpointSaver
from trichord.config.identity import RunFolder, prepare_run_folder, run_path, write_run_record
from trichord.config.load import resolved_yaml
from trichord.config.run import RunConfig
from trichord.core.dist import RankFacts
from trichord.core.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from trichord.core.log import configure_logging, get_logger
from trichord.core.seed import derive_seed
from trichord.core.status import clear_rank_statuses, write_atomically
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import apply_timeout, build_engine, set_rates, start_process_group
from trichord.engine.features import SlotLayout
from trichord.engine.partition import building_in, slices_of_run
from trichord.engine.step import Stepper
from trichord.engine.together import decide_on_rank_0
from trichord.engine.watch import StopFlag
from trichord.evaluate import OnTheWay, suite_sources
from trichord.fusion.model import Trichord
from trichord.journal import Progress, Recording
from trichord.restore import TOKENIZER_FOLDER, build_from_config, item_lengths, stored_config, training_lengths
from trichord.shards.follow import FOLLOW_FOLDER
from trichord.shards.index import index_shards
from trichord.shards.sources import expand_shards
from trichord.shards.storage import configure_storage
from trichord.tracking.metrics import append_event
from trichord.tracking.progress import work_progress
from trichord.tracking.recorder import Recorder
from trichord.verdict import Verdict

log = get_logger(__name__)
MAX_INDEXERS = 16


def run(config: RunConfig) -> int:
    """Train to the end, to a signal, or to an error, and leave the verdict in the run folder's status files.

    Returns:
        The exit code: 0 finished, 75 stopped on a signal with a checkpoint. Under torchrun 0 for both: it takes any
        other code of one rank for a crash and ends the rest; the verdict is in the status file.

    Raises:
        TrichordError: with its exit code, after the status was written.
    """
    stop = StopFlag().install()
    verdict = Verdict(config)
    try:
        code = train(config, stop, verdict)
        return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else code
    except BaseException as error:
        told = verdict.failed(error)
        if told is error:
            raise
        raise told from error
    finally:
        verdict.release()


def train(config: RunConfig, stop: StopFlag, verdict: Verdict) -> int:
    """The rooms in their order, then the loop. Returns the exit code."""
    # The job, and the run it is part of.
    facts, device = start_process_group(config.engine.timeout_s)
    folder, start, token = decide_on_rank_0(lambda: open_run(config, verdict))
    watch = verdict.begin(folder, start.step if start else 0)
    configure_logging(folder.path / "logs" / f"rank-{facts.rank:05d}.log")
    resumed = start if folder.kind != "fresh" else None

    # Shards: found and indexed, and the length of the run known, before anything large is built.
    decide_on_rank_0(lambda: make_sidecars(config))
    config = fix_length(config, folder)
    total_steps = config.run.max_steps or 0

    # Layers, encoders, fusion.
    tokenizer = load_tokenizer(config.batches.tokenizer)
    torch.manual_seed(derive_seed(config.run.seed, "weights"))  # equal on all ranks, whatever the world size
    slices = slices_of_run(config.engine)
    with building_in(slices):
        model = build_from_config(config, tokenizer, random_weights=resumed is None)
        if resumed is None:
            take_initial_weights(model, config)
    prepare_blocks(model, config.engine)

    # Samples, batches: how rows are dealt depends on what the model makes of them.
    lengths = training_lengths(config, model)
    loader = build_loader(config, lengths, folder, facts, resumed.loader if resumed else None)

    # Objectives, engine, checkpoints.
    layout = slot_layout(config, facts.world_size)
    engine = build_engine(
        *(model, config.engine),
        micro_rows=config.batches.micro_rows,
        grad_accum_steps=layout.num_micro_batches,
        slices=slices,
    )
    if resumed is not None:
        load_into(engine, resumed.folder)
    stepper = build_stepper(config, engine, device, layout)
    saver = CheckpointSaver(folder.path / "checkpoints", config.checkpoints, token, verdict.not_saved)
    apply_timeout(config.engine.timeout_s)

    # Tracking, then the steps.
    progress = Progress.after(resumed)
    recorder = build_recorder(config, folder, resumed, facts.rank == 0)
    recorder.event("start", progress.step, kind_of_start=folder.kind, world_size=facts.world_size)
    log.info("%s", opening_line(folder, resumed, progress.step, total_steps, facts.world_size))
    recording = Recording(config, recorder, stepper, folder, progress.step, model)
    on_the_way = OnTheWay(config, engine, tokenizer, device, recorder, recording)
    if folder.kind == "fresh":
        recording.damaged(loader.damage_records)
    if facts.rank == 0:
        tokenizer.save(folder.path / TOKENIZER_FOLDER)  # a checkpoint stays usable when the data has gone
    stopping = progress.step >= total_steps
    steps = move_ahead(iter(loader), device)
    watch.arm()
    while not stopping:
        recording.begin(progress.step)
        batch: StepBatch = next(steps)
        lr = set_rates(engine, config.engine, progress.step, total_steps)
        result = stepper.run(batch.micro_batches, local_counts(batch, stop))
        progress.advance(result)
        verdict.step = progress.step
        recording.step(progress, result, batch, lr=lr)
        progress.check(config, batch, result, recorder)
        stopping = result.counts["stop"] > 0 or progress.step >= total_steps
        on_the_way.after(progress.step, stopped=result.counts["stop"] > 0)
        if stopping or progress.step % config.checkpoints.save_every_steps == 0:
            stepper.clock.enter("save")
            recording.checkpoint(progress.step)  # first: the save may take the last room on the disk
            saver.begin(engine, progress.step, train_state(config, progress, recorder), batch.state, recorder.newest)
        record_saves(saver, recorder)

    # The end: the last checkpoint is on disk before anybody leaves.
    recording.close(progress.step)
    saved = saver.finish()
    record_saves(saver, recorder)
    finished = progress.step >= total_steps
    code = EXIT_DONE if finished else EXIT_STOPPED
    recorder.event("end", progress.step, finished=finished, checkpoint_saved=saved)
    watch.stop()
    recorder.close(code)
    steps.close()
    loader.close()
    verdict.ended(finished, saved, stop.name)
    log.info("%s", closing_line(finished, progress.step, stop.name))
    dist.barrier()
    dist.destroy_process_group()
    finish_mirror(saver, folder)
    return code


def take_initial_weights(model: Trichord, config: RunConfig) -> None:
    """Those that `run.init_from` names, if it does."""
    if config.run.init_from is not None:
        from trichord.release.import_ import load_initial_weights

        load_initial_weights(model, config.run.init_from)


def record_saves(saver: CheckpointSaver, recorder: Recorder) -> None:
    """Events of checkpoints that were committed, and of their copies on the mirror."""
    if (saved := saver.poll()) is not None:
        recorder.event("checkpoint", saved)
    for copied in saver.news():
        recorder.event("mirror", **copied)


def finish_mirror(saver: CheckpointSaver, folder: RunFolder) -> None:
    """The last copy. The verdict is written and no rank waits any more: a slow storage changes nothing."""
    saver.finish_mirror()
    for copied in saver.news():
        append_event(folder.path, "mirror", attempt=folder.attempt, **copied)


def fetch_from_mirror(config: RunConfig) -> None:
    """On rank 0, where the mirror has a newer checkpoint than the run folder: bring it, as if it had been saved here.

    Raises:
        ConfigError: `run.resume: never`, and the mirror holds a run of this name.
        CheckpointError: nothing is here, and the mirror cannot be looked at.
    """
    mirror, path = config.checkpoints.mirror, run_path(config)
    if mirror is None:
        return
    configure_storage(config.shards.storage)
    if config.run.resume == "never":
        if holds_checkpoints(mirror, path):
            raise ConfigError(
                f"{mirror_of(mirror, path)} holds checkpoints of a run of this name and run.resume is never; choose "
                "another run.name, or run.resume=auto"
            )
        return
    found = fetch_newer(mirror, path)
    if found is not None and not (path / "config.yaml").exists():
        stored = stored_config(found, read_train_state(found, needs=("config",))["config"])
        write_atomically(path / "config.yaml", resolved_yaml(stored))


def open_run(config: RunConfig, verdict: Verdict) -> tuple[RunFolder, LoadedState | None, str]:
    """On rank 0: the run folder, the checkpoint to go on from, and a name of this attempt that no other has."""
    verdict.hold(run_path(config))
    fetch_from_mirror(config)
    folder = prepare_run_folder(config)
    put_back_replaced(folder.path / "checkpoints")
    require_writable(folder.path / "checkpoints")
    clear_rank_statuses(folder.path)
    start = None
    if folder.kind == "branch":
        assert folder.branch_folder is not None
        assert folder.branch_step is not None
        start = read_facts(find_step(folder.branch_folder / "checkpoints", folder.branch_step))
        if (past := folder.branch_folder / FOLLOW_FOLDER).is_dir():  # which shards its epochs had
            shutil.copytree(past, folder.path / FOLLOW_FOLDER, dirs_exist_ok=True)
    elif folder.kind == "resume":
        latest = find_resumable(folder.path / "checkpoints")
        start = read_facts(latest) if latest is not None else None
    return folder, start, f"{folder.attempt}-{secrets.token_hex(4)}"


def opening_line(folder: RunFolder, resumed: LoadedState | None, step: int, total_steps: int, world_size: int) -> str:
    """What a user wants to know first: is this a new run, and where does it go on."""
    where = f"{folder.path} on {world_size} process{'es' if world_size > 1 else ''}, attempt {folder.attempt}"
    if step >= total_steps:
        return f"{where}: already at step {step} of {total_steps}, nothing to do; raise run.max_steps to go on"
    if resumed is not None:
        return f"{where}: going on from {resumed.folder.name}, to step {total_steps}"
    return f"{where}: a new run of {total_steps} steps"


def closing_line(finished: bool, step: int, signal_name: str) -> str:
    if finished:
        return f"finished at step {step}"
    return f"stopped at step {step} by {signal_name}, with a checkpoint; run the same command to go on"


def make_sidecars(config: RunConfig) -> None:
    """The sidecars of all shards, those that are missing or stale; on rank 0, so that all find them made."""
    configure_storage(config.shards.storage)
    for source in (*config.shards.sources, *suite_sources(config)):
        urls = expand_shards(source)
        with work_progress(f"index {source.name}", len(urls)) as advance:
            index_shards(
                urls, min(os.cpu_count() or 1, MAX_INDEXERS), lambda done, total, url: advance(1), source.fields
            )


def build_loader(
    config: RunConfig, lengths: ItemLengths, folder: RunFolder, facts: RankFacts, state: LoaderState | None
) -> Loader:
    return Loader(
        config.shards,
        config.samples,
        config.batches,
        seed=config.run.seed,
        lengths=lengths,
        rank=facts.rank,
        world_size=facts.world_size,
        state=state,
        follow_folder=folder.path / FOLLOW_FOLDER,
    )


def fix_length(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The config with `run.max_steps` set: counted, where only `epochs` are given, and written into the record."""
    if config.run.max_steps is not None:
        return config
    steps = decide_on_rank_0(
        lambda: count_steps(
            *(config.shards, config.samples, config.batches),
            seed=config.run.seed,
            lengths=item_lengths(config),
            follow_folder=folder.path / FOLLOW_FOLDER,
        )
    )
    if steps == 0:
        raise ConfigError("the sources hold no usable sample, so the run would have no step; see quarantine.jsonl")
    fixed = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": steps})})
    if dist.get_rank() == 0:
        write_run_record(folder, fixed)
    return fixed


def build_stepper(config: RunConfig, engine: Any, device: torch.device, layout: SlotLayout) -> Stepper:
    return Stepper(
        engine,
        config.objectives,
        device=device,
        layout=layout,
        max_grad_norm=config.engine.max_grad_norm,
        num_sources=len(config.shards.sources),
    )


def slot_layout(config: RunConfig, world_size: int) -> SlotLayout:
    """Micro-steps per step, and sample slots per micro-step."""
    rows, micro_rows = config.batches.rows_per_step, config.batches.micro_rows
    return SlotLayout(micro_rows * config.batches.max_samples_per_row, math.ceil(rows / (world_size * micro_rows)))


def local_counts(batch: StepBatch, stop: StopFlag) -> dict[str, float]:
    """What this rank adds to the step's count all-reduce besides tokens."""
    return {
        "samples": batch.stats.samples,
        "bad_samples": batch.stats.bad_samples,
        "filtered": sum(batch.stats.filtered.values()),
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
    recorder = Recorder(
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
    if resumed is not None:
        recorder.newest.update(resumed.train_state.get("metrics", {}))
    return recorder
