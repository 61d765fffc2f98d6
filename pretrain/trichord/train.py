"""The story of a run: each room is built in its order, then steps are taken until the end or a signal.

One loop serves pretraining, fine-tuning and the quick-start, on one process or a thousand.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from trichord.assembly import (
    build_loader,
    build_recorder,
    build_stepper,
    require_initial_weights,
    slot_layout,
    take_initial_weights,
)
from trichord.batches.loader import StepBatch
from trichord.batches.tokenizer import load_tokenizer
from trichord.batches.transfer import move_ahead
from trichord.checkpoints.load import load_into
from trichord.checkpoints.save import CheckpointSaver
from trichord.config.identity import RunFolder, run_path
from trichord.config.run import RunConfig
from trichord.core.errors import EXIT_DONE, StoppedError, TrichordError
from trichord.core.log import configure_logging, get_logger
from trichord.core.phase import set_phase
from trichord.core.seed import derive_seed
from trichord.engine.blocks import prepare_blocks
from trichord.engine.build import apply_timeout, build_engine, set_rates, start_process_group
from trichord.engine.doubts import doubts
from trichord.engine.job import check_job
from trichord.engine.partition import building_in, slices_of_run
from trichord.engine.step import restart_loss_scale
from trichord.engine.stop import StopFlag
from trichord.engine.together import decide_on_rank_0
from trichord.evaluate import OnTheWay
from trichord.journal import Recording
from trichord.opening import fix_length, make_sidecars, open_run, opening_line
from trichord.progress import Progress
from trichord.restore import TOKENIZER_FOLDER, build_from_config, training_lengths, whole_to_rewind
from trichord.tracking.metrics import append_event
from trichord.tracking.recorder import Recorder
from trichord.verdict import Ending, Verdict, ending_of

log = get_logger(__name__)


def run(config: RunConfig) -> int:
    """Train to the end, to a signal, or to an error, and leave the verdict in the run folder's status files.

    Returns:
        The exit code: 0 finished, 75 stopped on a signal, with a checkpoint unless no step was begun. Under torchrun 0
        for both: it takes any other code of one rank for a crash and ends the rest; the verdict is in the status file.

    Raises:
        TrichordError: with its exit code, after the status was written.
    """
    configure_logging()
    stop = StopFlag().install()
    verdict = Verdict(config)
    try:
        code = train(config, stop, verdict)
        return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else code
    except StoppedError as told:  # on all ranks
        verdict.stopped_early(told)
        dist.destroy_process_group()
        return EXIT_DONE if "TORCHELASTIC_RUN_ID" in os.environ else told.exit_code
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
    check_job(config.engine, config.batches.micro_rows, facts.world_size)
    folder, start, token = decide_on_rank_0(lambda: open_run(config, verdict))
    watch = verdict.begin(folder, start.step if start else 0)
    configure_logging(folder.path / "logs" / f"rank-{facts.rank:05d}.log")
    resumed = start if folder.kind != "fresh" else None
    if resumed is None:
        decide_on_rank_0(lambda: require_initial_weights(config))
    tokenizer = load_tokenizer(config.batches.tokenizer)

    # Shards: found and indexed, and the length of the run known, before anything large is built.
    decide_on_rank_0(lambda: make_sidecars(config, folder, stop))
    config = fix_length(config, folder)
    total_steps = config.run.max_steps or 0
    for doubt in doubts(config.engine, total_steps) if facts.rank == 0 else ():
        log.warning("%s", doubt)

    # Layers, encoders, fusion.
    torch.manual_seed(derive_seed(config.run.seed, "weights"))  # equal on all ranks, whatever the world size
    slices = slices_of_run(config.engine)
    with building_in(slices):
        model = build_from_config(config, tokenizer, random_weights=resumed is None)
        if resumed is None:
            take_initial_weights(model, config)
    prepare_blocks(model, config.engine)

    # Samples, batches: how rows are dealt depends on what the model makes of them.
    lengths = training_lengths(config, model)
    loader = build_loader(config, lengths, folder.path, facts, resumed.loader if resumed else None)

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
    progress, sharing = Progress.after(resumed), config.engine.sequence_parallel
    recorder = verdict.recorder = build_recorder(config, folder, resumed, facts.rank == 0)
    recorder.event("start", progress.step, kind_of_start=folder.kind, world_size=facts.world_size)
    log.info("%s", opening_line(folder, resumed, progress.step, total_steps, facts.world_size, sharing))
    recording = Recording(config, recorder, stepper, folder, progress.step, model, resumed.loader if resumed else None)
    on_the_way = OnTheWay(config, engine, tokenizer, device, recorder, recording, folder)
    if folder.kind == "fresh":
        recording.damaged(loader.damage_records)
    if facts.rank == 0:
        tokenizer.save(folder.path / TOKENIZER_FOLDER)  # a checkpoint stays usable when the data has gone
    ending = ending_of(progress.step, total_steps, used_up=resumed is not None and resumed.loader.exhausted)
    steps = move_ahead(iter(loader), device)
    save_due = False
    watch.arm()
    while ending is None:
        recording.begin(progress.step)
        batch: StepBatch = next(steps)
        lr = set_rates(engine, config.engine, progress.step, total_steps)
        result = stepper.run(batch.micro_batches, local_counts(batch, stop))
        progress.advance(result)
        verdict.step = progress.step
        recording.step(progress, result, batch, lr=lr)
        progress.check(config, batch, result, recorder)
        if progress.skipped_in_a_row >= config.engine.max_bad_steps:
            with recording.aside("rewind"):
                rewind(config, engine, progress, saver, recorder)
        asked = stop.told(result.counts["stop"])
        ending = ending_of(progress.step, total_steps, used_up=not result.counts["open_lanes"], signal_name=asked)
        on_the_way.after(progress.step, batch, stopped=asked is not None)
        # Not among skipped steps: a rewind must get away from their weights, and older ones would be removed for them;
        # nor right behind a rewind: that would be the checkpoint it took once more.
        save_due = save_due or progress.step % config.checkpoints.save_every_steps == 0
        if ending is not None or (save_due and progress.is_finite):
            save_due = False
            stepper.clock.enter("save")
            recording.checkpoint(progress.step)  # first: the save may take the last room on the disk
            saver.begin(engine, progress.step, train_state(config, progress, recorder), batch.state, recorder.newest)
        record_saves(saver, recorder)

    # The end: the last checkpoint is on disk before anybody leaves.
    recording.close(progress.step)
    saved = saver.finish()
    record_saves(saver, recorder)
    recorder.event("end", progress.step, checkpoint_saved=saved, **asdict(ending))
    watch.stop()
    recorder.close(ending.code)
    steps.close()
    loader.close()
    verdict.ended(ending, saved)
    if resumed is None or progress.step > resumed.step:  # else the opening line has said it
        log.info("%s", closing_line(ending, progress.step))
    dist.barrier()
    dist.destroy_process_group()
    finish_mirror(saver, folder)
    return ending.code


def rewind(config: RunConfig, engine: Any, progress: Progress, saver: CheckpointSaver, recorder: Recorder) -> None:
    """Too many steps in a row were not finite: on with the weights, optimizer states, average and running statistics of
    an earlier checkpoint. Step number and data go on, so that the data behind it is not met again. Called on all ranks.

    Raises:
        TrichordError: `engine.rewinds` are used up, or there is no checkpoint to go back to.
    """
    allowed = config.engine.rewinds
    used_up, back = progress.rewinds >= allowed, None
    if not used_up:
        saver.finish()
        record_saves(saver, recorder)
        set_phase("rewind")
        back = whole_to_rewind(saver.folder, progress.rewound_to)
    if back is None:
        why = f"engine.rewinds ({allowed}) are used up" if used_up else "there is no checkpoint to go back to"
        if not used_up and progress.rewound_to is not None:
            why += f" before step {progress.rewound_to}, whose weights were tried"
        raise TrichordError(
            f"{progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient (the last is "
            f"{progress.step}); the weights are those before them{f', and {why}' if allowed else ''}. Lower engine.lr, "
            f"or look at the samples: `trichord provenance {run_path(config)} --step {progress.step}`"
        )
    bad_steps = progress.skipped_in_a_row
    progress.went_back(load_into(engine, back).step)
    restart_loss_scale(engine)
    log.warning(
        "step %d: %d steps in a row were not finite; back to the weights of %s, on with the data of step %d (rewind %d "
        "of %d)",
        *(progress.step, bad_steps, back.name, progress.step + 1, progress.rewinds, allowed),
    )
    recorder.event("rewind", progress.step, to_step=progress.rewound_to, rewinds=progress.rewinds)


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


def closing_line(ending: Ending, step: int) -> str:
    if ending.finished:
        return f"finished at step {step}: {ending.reason}"
    return f"stopped at step {step} by {ending.signal}, with a checkpoint; run the same command to go on"


def local_counts(batch: StepBatch, stop: StopFlag) -> dict[str, float]:
    """What this rank adds to the step's count all-reduce besides tokens."""
    return {
        "samples": batch.stats.samples,
        "bad_samples": batch.stats.bad_samples,
        "filtered": sum(batch.stats.filtered.values()),
        "open_lanes": batch.state.open_lanes,
        "stop": stop.vote(dist.get_rank()),
    }


def train_state(config: RunConfig, progress: Progress, recorder: Recorder) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return {
        "progress": asdict(progress),
        "seed": config.run.seed,
        "wandb_run_id": recorder.wandb_run_id,
        "config": config.model_dump(mode="json"),
    }
