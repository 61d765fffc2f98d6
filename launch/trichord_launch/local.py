"""`trichord-launch local`: a config and a number of processes -> a supervised torchrun on this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from trichord.config.identity import inspect_run_folder, run_path
from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord_launch.command import TRAIN_ENTRY, Command, LocalJob, render, stop_timeout_s
from trichord_launch.job_size import require_groups, size_warnings
from trichord_launch.machine import require_fit, this_machine
from trichord_launch.record import next_attempt
from trichord_launch.supervise import supervise, tell
from trichord_launch.verdict import Verdict


def launch_local(
    config: str,
    overrides: Sequence[str] = (),
    *,
    procs: int | None = None,
    max_restarts: int = 0,
    entry: Sequence[str] = TRAIN_ENTRY,
) -> Verdict:
    """Train on this machine until the run finishes, is stopped, or fails for good.

    config: file or name of a shipped config; overrides: `a.b=c`; procs: ranks, None: one per GPU, or one on the CPU.

    Raises:
        ConfigError: the config is wrong, more processes than GPUs, a number that groups do not divide, or another
            launcher holds the run.
        CheckpointError: the config does not fit the run that stands in its folder.
    """
    folder, command_of = _prepare(config, overrides, procs, entry)
    return supervise(folder, command_of, max_restarts=max_restarts)


def show_local(config: str, overrides: Sequence[str] = (), *, procs: int | None = None) -> str:
    """What `launch_local` would start, as shell text; checks the same and writes nothing. Raises the same errors."""
    folder, command_of = _prepare(config, overrides, procs, TRAIN_ENTRY)
    return command_of(next_attempt(folder), False).as_shell()


def _prepare(config: str, overrides: Sequence[str], procs: int | None, entry: Sequence[str]):
    """(run folder, command of an attempt). Everything a user can have got wrong is said here, before a start."""
    resolved = load_run_config(config, overrides)
    inspect_run_folder(resolved)
    machine = this_machine()
    ranks = procs if procs is not None else max(1, machine.gpus)
    if ranks < 1:
        raise ConfigError(f"--procs must be at least 1, got {ranks}")
    require_fit(ranks, machine)
    require_groups(resolved, ranks)
    for said in size_warnings(resolved, ranks, ranks):
        tell(f"warning: {said}")
    folder = run_path(resolved)

    def command_of(attempt: int, restart: bool) -> Command:
        # The first start has made the run; `never` would refuse it on the second.
        again = ["run.resume=auto"] if restart and resolved.run.resume == "never" else []
        job = LocalJob(
            run_folder=folder,
            run_name=resolved.run.name,
            config=config,
            overrides=(*overrides, *again),
            procs=ranks,
            attempt=attempt,
            stop_timeout_s=stop_timeout_s(resolved),
            interactive=sys.stderr.isatty(),
        )
        return render(job, machine, os.environ, entry=entry)

    return folder, command_of
