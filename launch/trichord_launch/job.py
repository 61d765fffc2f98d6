"""A Slurm job as plain values: what the login node writes into `job.json`, and the batch process reads."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trichord.core.errors import ConfigError
from trichord_launch.command import TRAIN_ENTRY

NODE_RUNNER = ("-m", "trichord_launch.node")
RANK_RUNNER = ("-m", "trichord_launch.rank")


@dataclass(frozen=True)
class NodeCheck:
    """What a node must pass; see `NodeCheckConfig`. The last four are asked by the preflight only.

    min_device_gib: memory of each GPU; commit: of the code, which a job may not compare, since somebody may commit
    while it starts; see: paths that must be there; token: (file, text) that was written before.
    """

    min_disk_free_gib: float = 1.0
    min_shm_free_gib: float = 1.0
    max_clock_skew_s: float = 5.0
    commands: tuple[str, ...] = ()
    timeout_s: float = 120.0
    min_device_gib: float = 0.0
    commit: bool = False
    see: tuple[str, ...] = ()
    token: tuple[str, ...] = ()


@dataclass(frozen=True)
class Budget:
    """How often a job may be started again.

    restarts: after crashes, over all of its life; requeues: after time limits, preemptions and lost nodes.
    same_step: this many crashes at one step end it.
    """

    restarts: int = 3
    requeues: int = 100
    same_step: int = 2


@dataclass(frozen=True)
class SlurmJob:
    """Everything the batch process needs. Paths are absolute.

    submission: its folder under the run's `submissions/`; config: the snapshot in it, from which the job trains.
    launcher: `torchrun` starts one per node, `srun` one task per rank. cores: per rank, None: unknown.
    python: for the ranks; entry: what each rank runs before the config.
    runner: the module that a task of srun runs. srun, prefix: more options, words in front of the task's command.
    requeue: the job may be put back into the queue. network_gb_per_s: of a node, as the cluster file promises.
    """

    run_name: str
    run_folder: str
    submission: str
    config: str
    resume: str
    nodes: int
    ranks_per_node: int
    launcher: Literal["torchrun", "srun"] = "torchrun"
    cores: int | None = None
    gpus: bool = True
    python: str = "python"
    entry: tuple[str, ...] = TRAIN_ENTRY
    runner: tuple[str, ...] = NODE_RUNNER
    srun: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    requeue: bool = True
    stop_timeout_s: float = 660.0
    budget: Budget = Budget()
    check: NodeCheck = NodeCheck()
    network_gb_per_s: float | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def folder(self) -> Path:
        return Path(self.run_folder)

    @property
    def submission_id(self) -> str:
        return Path(self.submission).name

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_job(path: Path) -> SlurmJob:
    """The job in a `job.json`.

    Raises:
        ConfigError: there is none, or another version of the launcher wrote it.
    """
    try:
        values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        told: dict[str, Any] = values.pop("check")
        check: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
        budget = Budget(**values.pop("budget"))
        return SlurmJob(**values, budget=budget, check=NodeCheck(**check))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); submit the run again") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{path}: expected a job as this version of the launcher writes it, got {error}; submit the run again"
        ) from error
