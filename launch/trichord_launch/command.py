"""The command of a job on this machine, as pure functions: a description in, argument list and environment out."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trichord.config.run import RunConfig
from trichord_launch.machine import Machine

TRAIN_ENTRY = ("-m", "trichord.cli", "train")
# Ranks that share torchrun's own store could not connect to each other after a restart (torch 2.14).
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_STOP_MARGIN_S = 60.0


@dataclass(frozen=True)
class LocalJob:
    """One attempt of a run on this machine.

    config: file or name of a shipped config, as the user gave it; overrides: `a.b=c`.
    attempt: number of this start, from 1. procs: ranks.
    stop_timeout_s: how long ranks may take to save after a signal that reaches torchrun itself.
    interactive: a person watches on a terminal, so rank 0 keeps it (for its progress bar).
    """

    run_folder: Path
    run_name: str
    config: str
    overrides: tuple[str, ...]
    procs: int
    attempt: int
    stop_timeout_s: float = 660.0
    interactive: bool = False

    @property
    def attempt_folder(self) -> Path:
        return self.run_folder / "attempts" / str(self.attempt)


@dataclass(frozen=True)
class Command:
    """argv, and the variables it adds to the environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def as_shell(self) -> str:
        """The command as text a shell would take, one variable or option a line."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " \\\n  ".join([*variables, *_one_option_a_line(self.argv)])


def render(
    job: LocalJob,
    machine: Machine,
    environ: Mapping[str, str],
    *,
    python: str = sys.executable,
    entry: Sequence[str] = TRAIN_ENTRY,
) -> Command:
    """The torchrun command of a job. entry: what each rank runs, before the config and the overrides."""
    return Command(tuple(_argv(job, python, entry)), _environment(job, machine, environ, python))


def _argv(job: LocalJob, python: str, entry: Sequence[str]) -> list[str]:
    argv = [python, "-m", "trichord_launch.torchrun"]
    argv += ["--nnodes", "1", "--nproc-per-node", str(job.procs)]
    # Port 0: the rendezvous store takes a free port itself, so that two jobs never race for one.
    argv += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", f"{job.run_name}-{job.attempt}"]
    argv += ["--local-addr", "127.0.0.1"]  # without it torchrun resolves the host's name, which a laptop may not have
    argv += ["--max-restarts", "0"]  # restarts are decided by the status files, from outside
    argv += ["--log-dir", str(job.attempt_folder / "torchrun")]
    # A copy of all that ranks print; on a terminal rank 0 keeps it to itself, or it could draw no progress bar.
    if not job.interactive:
        argv += ["--tee", "3"]
    elif job.procs > 1:
        argv += ["--tee", ",".join(f"{rank}:3" for rank in range(1, job.procs))]
    return [*argv, *entry, job.config, *job.overrides]


def stop_timeout_s(config: RunConfig) -> float:
    """How long ranks may take to save after a signal, before whatever started them ends them."""
    return config.checkpoints.commit_timeout_s + _STOP_MARGIN_S


def rank_environment(extensions: str, stop_timeout_s: float) -> dict[str, str]:
    """Variables that ranks need wherever they are started. extensions: a folder of this job's own."""
    return {
        # DeepSpeed's compiled operators: a folder for each, so that jobs never wait for each other's locks.
        "TORCH_EXTENSIONS_DIR": extensions,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(stop_timeout_s)),
    }


def _environment(job: LocalJob, machine: Machine, environ: Mapping[str, str], python: str) -> dict[str, str]:
    """Variables the job needs. What the user has set stays, except for the ones that name this attempt."""
    defaults = {
        "OMP_NUM_THREADS": str(max(1, machine.cores // job.procs)),
        **rank_environment(str((job.run_folder / "torch_extensions").absolute()), job.stop_timeout_s),
        "GLOO_SOCKET_IFNAME": "lo",  # all ranks are here; the network of a laptop comes and goes
        **OWN_STORE,
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded while ranks wait; `preflight --fetch` does it before
        "PYTHONUNBUFFERED": "1",
    }
    if machine.gpus == 0:
        defaults["DS_ACCELERATOR"] = "cpu"
    chosen = {name: value for name, value in defaults.items() if name not in environ}
    tools = str(Path(python).absolute().parent)  # ninja, which DeepSpeed calls by name, lies beside the interpreter
    path = environ.get("PATH", "")
    if tools not in path.split(":"):
        chosen["PATH"] = f"{tools}:{path}" if path else tools
    return {**chosen, "TRICHORD_ATTEMPT": str(job.attempt)}


def _one_option_a_line(argv: Sequence[str]) -> list[str]:
    """`--nnodes 1` stays on one line, as does everything from the entry on."""
    lines: list[str] = []
    for argument in argv:
        joins = lines and not argument.startswith("--")
        if joins:
            lines[-1] += f" {shlex.quote(argument)}"
        else:
            lines.append(shlex.quote(argument))
    return lines
