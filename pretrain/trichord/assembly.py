"""Rooms put together from a run config, as training, replays and benchmarks do alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from trichord.batches.loader import ItemLengths, Loader, LoaderState
from trichord.checkpoints.load import LoadedState
from trichord.config.identity import RunFolder
from trichord.config.run import RunConfig
from trichord.core.dist import RankFacts
from trichord.engine.features import SlotLayout
from trichord.engine.sequence import data_place
from trichord.engine.step import Stepper
from trichord.fusion.model import Trichord
from trichord.shards.follow import FOLLOW_FOLDER
from trichord.tracking.recorder import Recorder


def take_initial_weights(model: Trichord, config: RunConfig) -> None:
    """Those that `run.init_from` names, if it does."""
    if config.run.init_from is not None:
        from trichord.release.import_ import load_initial_weights

        load_initial_weights(model, config.run.init_from)


def require_initial_weights(config: RunConfig) -> None:
    """That something is at `run.init_from`, before the shards are looked at. Raises ConfigError: nothing is."""
    if config.run.init_from is not None:
        from trichord.release.import_ import require_source

        require_source(config.run.init_from)


def build_loader(
    config: RunConfig, lengths: ItemLengths, run: Path, facts: RankFacts, state: LoaderState | None
) -> Loader:
    """run: the run folder, which has the record of followed sources. state: to go on from; None: from the start."""
    place = data_place(config.engine, facts)
    return Loader(
        config.shards,
        config.samples,
        config.batches,
        seed=config.run.seed,
        lengths=lengths,
        rank=place.rank,
        world_size=place.world_size,
        state=state,
        follow_folder=run / FOLLOW_FOLDER,
        sequence_place=place.place,
        sequence_size=place.size,
    )


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
    """Micro-steps per step, and sample slots per micro-step of one rank."""
    rows, micro_rows = config.batches.rows_per_step, config.batches.micro_rows
    sharing = config.engine.sequence_parallel
    micro_batches = math.ceil(rows / (world_size // sharing * micro_rows))
    return SlotLayout.of(micro_rows * config.batches.max_samples_per_row, sharing, micro_batches)


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
