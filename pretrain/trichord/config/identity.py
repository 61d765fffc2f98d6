"""Which run is this: a fresh one, the next attempt of one that stands, or a branch of another.

A run is its folder `root/name`. `prepare_run_folder` decides by `run.resume` and what lies there, refuses a config
that is not the run's own, and writes the record of the attempt. Which *checkpoint* to go on from is decided by the
checkpoints room.
"""

import json
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

from trichord.config.environment import environment, git_state
from trichord.config.load import load_run_config, resolved_yaml
from trichord.config.run import RunConfig
from trichord.core.errors import CheckpointError, ConfigError
from trichord.core.status import current_attempt, write_atomically
from trichord.engine.config import RoomRates
from trichord.fusion.config import RoomName

# Keys that may differ between a run and its continuation; `*` is any one part, a trailing `**` anything below.
# They say how the work is laid out, how long it goes, how fast it learns, and what is recorded. Everything else decides
# what the weights or the order of the data mean, and a change to it is another run.
MAY_CHANGE_ON_RESUME = (
    "run.name",  # the folder was renamed or moved; the run is the folder
    "run.root",
    "run.max_steps",
    "run.resume",
    "shards.sources.*.weight",
    "shards.sources.*.weight_schedule",
    "shards.sources.*.shards",  # a copy elsewhere: the loader state knows the content, not the place
    "shards.sources.*.filters.exclude",  # likewise
    "shards.group_weights.**",
    "shards.weights_by",
    "shards.storage.**",
    "shards.max_bad_fraction",
    "shards.min_samples_for_bad_fraction",
    "samples.audio.mel",
    "batches.micro_rows",
    "batches.deal_ranks",
    "batches.num_workers",
    "batches.prefetch_steps",
    "layers.kernels",
    "engine.zero_stage",
    "engine.lr",
    "engine.muon.lr",
    "engine.rooms.*.lr_ratio",
    "engine.rooms.*.layer_decay",
    "engine.rooms.*.schedule",
    "engine.rooms.*.start_step",
    "engine.schedule",
    "engine.decay_steps",
    "engine.warmup_steps",
    "engine.min_lr_ratio",
    "engine.ema_decay",  # the training does not see it
    "engine.activation_checkpointing",
    "engine.checkpoint_every_blocks",
    "engine.sequence_parallel",
    "engine.compile",
    "engine.zero_init",
    "engine.nvme_path",
    "engine.hpz_ranks",
    "engine.max_bad_steps",
    "engine.rewinds",
    "engine.timeout_s",
    "engine.heartbeat_timeout_s",
    "engine.stuck_after_s",
    "engine.offload",
    "engine.offload_optimizer",
    "engine.deepspeed.**",
    "checkpoints.**",
    "tracking.**",
    "evaluation.**",  # the training does not see it
)
_MAY_CHANGE_IN_A_BRANCH = ("run.init_from",)

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives and how it starts. Plain values: rank 0 prepares it and broadcasts it.

    kind: `fresh` has nothing to go on from; `resume` goes on from this folder's newest checkpoint; `branch` starts from
    step `branch_step` of the run in `branch_folder`. attempt counts from 1.
    """

    kind: Literal["fresh", "resume", "branch"]
    path: Path
    attempt: int
    branch_folder: Path | None = None
    branch_step: int | None = None

    @property
    def attempt_path(self) -> Path:
        return self.path / "attempts" / str(self.attempt)


def prepare_run_folder(config: RunConfig) -> RunFolder:
    """Decide fresh, resume or branch; make the folder and write `config.yaml` and `environment.json`. Rank 0 only.

    The newest attempt's config is `runs/NAME/config.yaml`; each attempt keeps its own under `attempts/K/`.

    Raises:
        ConfigError: `resume: never` and the folder holds a run; a branch onto itself or with `init_from`; the folder
            cannot be made.
        CheckpointError: a key differs from the run's that may not; the run to branch from is not there.
    """
    folder = inspect_run_folder(config)
    try:
        attempt = _claim_attempt(folder.path, folder.attempt)
        folder = RunFolder(folder.kind, folder.path, attempt, folder.branch_folder, folder.branch_step)
        write_run_record(folder, config)
    except OSError as error:
        raise ConfigError(
            f"run folder {folder.path} cannot be written: {error.strerror} ({error.filename}); choose another run.root"
        ) from error
    return folder


def inspect_run_folder(config: RunConfig) -> RunFolder:
    """The decision of `prepare_run_folder` without writing anything. Raises the same errors."""
    path = run_path(config)
    branch = _branch_of(config)
    if config.run.resume == "never" and _holds_a_run(path):
        raise ConfigError(
            f"run folder {path} exists and run.resume is never; choose another run.name, or run.resume=auto"
        )
    if _holds_a_checkpoint(path):
        old = read_run_config(path)
        if branch is not None and old.run.resume != config.run.resume:
            raise ConfigError(
                f"run folder {path} exists and did not start as a branch of {config.run.resume} "
                f"(its run.resume is {old.run.resume}); choose another run.name for the branch"
            )
        compare_for_resume(old, config)
        return RunFolder("resume", path, _next_attempt(path))
    # Nothing has been learned under this name yet, so nothing binds the config: a first attempt that died of a wrong
    # path is simply started again.
    if branch is None:
        return RunFolder("fresh", path, _next_attempt(path))
    compare_for_resume(read_run_config(branch[0]), config, branch=True)
    return RunFolder("branch", path, _next_attempt(path), *branch)


def compare_for_resume(old: RunConfig, new: RunConfig, branch: bool = False) -> None:
    """Refuse a continuation whose config differs in a key that is not in `MAY_CHANGE_ON_RESUME`.

    branch: the run branched from may have had a starting point of its own.

    Raises:
        CheckpointError: lists every such key with both values.
    """
    allowed = [tuple(key.split(".")) for key in MAY_CHANGE_ON_RESUME + (_MAY_CHANGE_IN_A_BRANCH if branch else ())]
    differences = _differences(_comparable(old), _comparable(new), ()) + _reordered_sources(old, new)
    refused = [d for d in differences if not any(_matches(d[0], pattern) for pattern in allowed)]
    if not refused:
        return
    lines = [f"  {'.'.join(path)}: {_show(before)} in the run, {_show(after)} now" for path, before, after in refused]
    raise CheckpointError(
        f"run {old.run.name!r} cannot go on with this config; these keys may not change on resume:\n"
        + "\n".join(lines)
        + "\nput the old values back, or start a new run with another run.name"
    )


def run_path(config: RunConfig) -> Path:
    """`root/name`. Raises ConfigError for a root that is no folder on this machine."""
    if "://" in config.run.root:
        raise ConfigError(f"run.root must be a folder on a mounted file system, got {config.run.root!r}")
    path = Path(config.run.root).expanduser() / config.run.name
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"run folder {path} cannot be written: {existing} is a file; choose another run.root")
    return path


def read_run_config(folder: Path) -> RunConfig:
    """The resolved config a run folder holds. Raises CheckpointError where there is none or it does not load."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder} is no run folder: it holds no config.yaml")
    try:
        return load_run_config(file)
    except ConfigError as error:
        raise CheckpointError(
            f"the config of run {folder} does not load with this version of Trichord:\n{error}"
        ) from error


def write_run_record(folder: RunFolder, config: RunConfig) -> None:
    """(Re)write the resolved config and the environment of this attempt, each file atomically. Rank 0 only.

    Call it again once derived keys are fixed (`run.max_steps` counted from epochs).
    """
    record = {
        "attempt": folder.attempt,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": git_state(),
        **environment(),
    }
    for place in (folder.path, folder.attempt_path):
        write_atomically(place / "config.yaml", resolved_yaml(config))
        write_atomically(place / "environment.json", json.dumps(record, indent=2) + "\n")


def _branch_of(config: RunConfig) -> tuple[Path, int] | None:
    """(run folder, step) of `run.resume: RUN@STEP`; RUN is a path, or a name under `run.root`."""
    if config.run.resume in ("auto", "never"):
        return None
    name, _, step = config.run.resume.rpartition("@")
    named = run_path(config).parent / name
    folder = Path(name).expanduser() if _holds_a_run(Path(name).expanduser()) else named
    if config.run.init_from is not None:
        raise ConfigError(
            f"run.resume {config.run.resume!r} and run.init_from are both starting points; set one of them"
        )
    if folder.resolve() == run_path(config).resolve():
        raise ConfigError(f"a branch of {name} needs a run.name of its own, got {config.run.name!r}")
    if not _holds_a_run(folder):
        raise CheckpointError(f"run.resume {config.run.resume!r}: no run folder at {name} or {named}")
    return folder, int(step)


def _holds_a_run(path: Path) -> bool:
    """A folder that a launcher made for its logs or a snapshot of the code is not yet a run."""
    return (path / "config.yaml").is_file() or (path / "metrics.jsonl").is_file() or _holds_a_checkpoint(path)


def _holds_a_checkpoint(path: Path) -> bool:
    """Whole or broken: whether one can be loaded is for the checkpoints room to say, which refuses to start over it."""
    steps = (path / "checkpoints").glob("step-*")
    return any(step.name.removeprefix("step-").isdigit() for step in steps)


def _next_attempt(path: Path) -> int:
    attempts = path / "attempts"
    taken = [int(p.name) for p in attempts.iterdir() if p.name.isdigit()] if attempts.is_dir() else []
    return max(taken, default=0) + 1


def _claim_attempt(path: Path, attempt: int) -> int:
    """Make `attempts/K` for the first free K from `attempt` on, so that two starts never share one.

    A launcher has made its own already, and says which.
    """
    if given := current_attempt():
        (path / "attempts" / str(given)).mkdir(parents=True, exist_ok=True)
        return given
    (path / "attempts").mkdir(parents=True, exist_ok=True)
    while True:
        try:
            (path / "attempts" / str(attempt)).mkdir()
            return attempt
        except FileExistsError:
            attempt += 1


def _comparable(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts, sources by name."""
    data = config.model_dump(mode="json")
    plain = RoomRates().model_dump(mode="json")  # how a room learns that is not named
    data["engine"]["rooms"] = dict.fromkeys(get_args(RoomName), plain) | data["engine"]["rooms"]
    data["shards"]["sources"] = {source.pop("name"): source for source in data["shards"]["sources"]}
    return data


def _reordered_sources(old: RunConfig, new: RunConfig) -> list[tuple[KeyPath, Any, Any]]:
    """The same sources in another order: their numbers are in the loader's state."""
    names = [[source.name for source in config.shards.sources] for config in (old, new)]
    reordered = names[0] != names[1] and sorted(names[0]) == sorted(names[1])
    return [(("shards", "sources"), names[0], names[1])] if reordered else []


def _differences(old: Any, new: Any, path: KeyPath) -> list[tuple[KeyPath, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [d for key in keys for d in _differences(old.get(key), new.get(key), (*path, str(key)))]
    return [] if old == new else [(path, old, new)]


def _matches(path: KeyPath, pattern: KeyPath) -> bool:
    if pattern[-1] == "**":
        path, pattern = path[: len(pattern) - 1], pattern[:-1]
    return len(path) == len(pattern) and all(p in ("*", part) for part, p in zip(path, pattern))


def _show(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
