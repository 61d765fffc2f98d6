"""The opening of a run, before any room is built: its folder and what it goes on from, sidecars, its length.

What is decided here is decided on rank 0 and told to all.
"""

from __future__ import annotations

import os
import secrets
import shutil

import torch.distributed as dist

from trichord.batches.loader import count_steps
from trichord.checkpoints.commit import put_back_replaced, require_writable
from trichord.checkpoints.load import LoadedState, find_resumable, find_step, read_facts, read_train_state
from trichord.checkpoints.mirror import fetch_newer, holds_checkpoints
from trichord.checkpoints.mirror_place import mirror_of, require_place
from trichord.config.identity import RunFolder, prepare_run_folder, run_path, write_run_record
from trichord.config.load import resolved_yaml
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError, DataError, StoppedError
from trichord.core.status import clear_rank_statuses, write_atomically
from trichord.engine.stop import StopFlag
from trichord.engine.together import decide_on_rank_0
from trichord.evaluate import suite_sources
from trichord.restore import item_lengths, stored_config
from trichord.samples.filters import read_exclude_list
from trichord.samples.unread import warn_at_start
from trichord.shards.config import SourceConfig
from trichord.shards.follow import FOLLOW_FOLDER
from trichord.shards.index import ShardHeader, index_shards
from trichord.shards.known import SHARDS_FILE, check_shards, record_shards
from trichord.shards.sources import expand_shards
from trichord.shards.storage import configure_storage
from trichord.tracking.progress import work_progress
from trichord.verdict import Verdict

MAX_INDEXERS = 16


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
    require_place(mirror, path)
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


def make_sidecars(config: RunConfig, folder: RunFolder, stop: StopFlag) -> None:
    """The sidecars of all shards, those that are missing or stale; on rank 0, so that all find them made. A run that
    goes on must find the shards that it began with.

    Raises:
        StoppedError: a signal came while shards were indexed, which may take hours.
        ConfigError: an exclude list cannot be read.
        DataError: a shard cannot be read, or is not what it was when the run began.
    """
    configure_storage(config.shards.storage)
    sources = (*config.shards.sources, *suite_sources(config))
    lists = dict.fromkeys(path for source in sources for path in source.filters.exclude)
    excluded = {path: read_exclude_list(path) for path in lists}  # before hours of indexing
    found = [(source, _indexed(source, stop)) for source in sources]
    learned = {source.name: shards for source, shards in found[: len(config.shards.sources)] if not source.follow}
    began = folder.branch_folder or folder.path
    if folder.kind != "fresh":
        check_shards(began / SHARDS_FILE, learned, "put them back as they were, or start a new run")
    if folder.kind != "resume":
        record_shards(folder.path / SHARDS_FILE, learned)
    warn_at_start(found, excluded, config.shards.max_member_bytes)


def _indexed(source: SourceConfig, stop: StopFlag) -> list[ShardHeader]:
    urls = expand_shards(source)
    with work_progress(f"index {source.name}", len(urls)) as advance:

        def note(done: int, total: int, url: str) -> None:
            advance(1)
            if stop.is_set:
                raise StoppedError(
                    f"stopped by {stop.name} before the first step, with {done} of {total} shards of {source.name} "
                    "indexed, which stay so; run the same command to go on"
                )

        return index_shards(urls, min(os.cpu_count() or 1, MAX_INDEXERS), note, source.fields)


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
        raise DataError(
            "the sources hold no usable sample, so the run would have no step: all are bad, filtered or longer than "
            "batches.row_tokens; `trichord data lint CONFIG` says which"
        )
    fixed = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": steps})})
    if dist.get_rank() == 0:
        write_run_record(folder, fixed)
    return fixed


def opening_line(
    folder: RunFolder, resumed: LoadedState | None, step: int, total_steps: int, world_size: int, sharing: int = 1
) -> str:
    """What a user wants to know first: is this a new run, and where does it go on. sharing: ranks that share rows."""
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    processes += f", {sharing} to each row" if sharing > 1 else ""
    where = f"{folder.path} on {processes}, attempt {folder.attempt}"
    if resumed is not None and resumed.loader.exhausted:
        return (
            f"{where}: all sources are used up since step {step}, nothing to do; more epochs are a new run, from these "
            "weights by run.init_from"
        )
    if step >= total_steps:
        return f"{where}: already at step {step} of {total_steps}, nothing to do; raise run.max_steps to go on"
    if resumed is not None:
        return f"{where}: going on from {resumed.folder.name}, to step {total_steps}"
    return f"{where}: a new run of {total_steps} steps"
