"""The ssh commands of a job on a list of hosts, as pure functions: a description in, one argument list per host out."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trichord_launch.command import OWN_STORE, TRAIN_ENTRY, Command, rank_environment

AGENT = ("-m", "trichord_launch.host_agent")
RUNNER = ("-m", "trichord_launch.torchrun")
SSH_OPTIONS = (
    # Never asks: a password for each of 50 hosts is no way to start a job.
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    # A host that is cut off is noticed within a minute.
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4"),
)


@dataclass(frozen=True)
class HostsJob:
    """One attempt of a run on hosts that share a file system. Paths are absolute, and the same on all of them.

    hosts: names under which they reach each other, and ssh reaches them; the first one hosts the rendezvous.
    modules, setup: shell words and lines before the interpreter starts. python: on the hosts. ssh: the client's words.
    gpus: whether ranks use them; None: where a host has some. stop_timeout_s: how long ranks may take to save after a
    signal that reaches torchrun itself. begin_s: how long modules and setup may take on a host.
    """

    run_folder: Path
    run_name: str
    config: str
    overrides: tuple[str, ...]
    hosts: tuple[str, ...]
    procs: int
    attempt: int
    port: int
    cwd: Path
    python: str
    ssh: tuple[str, ...] = ("ssh",)
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    network_interface: str | None = None
    gpus: bool | None = True
    stop_timeout_s: float = 660.0
    begin_s: float = 120.0
    runner: tuple[str, ...] = RUNNER
    entry: tuple[str, ...] = TRAIN_ENTRY

    @property
    def attempt_folder(self) -> Path:
        return self.run_folder / "attempts" / str(self.attempt)


def train_commands(job: HostsJob) -> dict[str, list[str]]:
    """Host -> the ssh command that starts its torchrun, by way of an agent that passes a stop on to the ranks."""
    return {host: ssh_command(job, host, _train_words(job, node)) for node, host in enumerate(job.hosts)}


def ssh_command(job: HostsJob, host: str, words: Sequence[str], limit_s: float | None = None) -> list[str]:
    """`words`, given to the host's interpreter inside the job's environment; ended there after `limit_s`."""
    lines = ["set -eo pipefail", f"cd {shlex.quote(str(job.cwd))}"]  # as the batch script of a Slurm job does
    lines += [f"module load {' '.join(map(shlex.quote, job.modules))}"] if job.modules else []
    # Each by itself: a comment at its end takes nothing else with it, nor does it read what the agent is told.
    lines += [f"eval {shlex.quote(line)} </dev/null" for line in job.setup]
    variables = [f"{name}={shlex.quote(value)}" for name, value in host_environment(job).items()]
    lines += [f"exec env {' '.join(variables)} {shlex.join([job.python, *words])}"]
    login = ["bash", "-lc", "; ".join(lines)]  # whatever the login shell there is; a login, so that `module` exists
    # The end of a connection ends nothing on the host by itself.
    limited = ["timeout", "-k", "5", f"{limit_s:g}", *login] if limit_s is not None else login
    return [*job.ssh, *SSH_OPTIONS, host, "--", f"exec {shlex.join(limited)}"]


def fan_out(job: HostsJob, python: str) -> Command:
    """The process on this machine that holds the connections, one per host."""
    words = [word for host, command in train_commands(job).items() for word in (host, shlex.join(command))]
    limits = (f"{job.begin_s:g}", f"{job.stop_timeout_s:g}")
    return Command((python, "-m", "trichord_launch.fan_out", str(job.attempt_folder / "hosts"), *limits, *words), {})


def launch_id(job: HostsJob, host: str) -> str:
    """Marks the processes of this attempt on a host; the launcher knows it without having heard of them."""
    return hashlib.blake2b(f"{job.run_folder} {job.attempt} {host}".encode(), digest_size=8).hexdigest()


def as_shell(job: HostsJob) -> str:
    """The commands as text, for a person to read."""
    return "\n".join(f"# {host}\n{shlex.join(command)}" for host, command in train_commands(job).items())


def host_environment(job: HostsJob) -> dict[str, str]:
    """Variables of the ranks, and of what looks at a host."""
    variables = {
        "TRICHORD_ATTEMPT": str(job.attempt),
        **rank_environment(str(job.run_folder / "torch_extensions"), job.stop_timeout_s),
        **OWN_STORE,
        "HF_HUB_OFFLINE": "1",  # nothing is downloaded while ranks wait; `preflight --fetch` does it before
        "PYTHONUNBUFFERED": "1",
        "TRICHORD_RANKS_PER_NODE": str(job.procs),
    }
    if job.gpus is False:
        variables["DS_ACCELERATOR"] = "cpu"
    if job.network_interface:
        variables |= {"GLOO_SOCKET_IFNAME": job.network_interface, "NCCL_SOCKET_IFNAME": job.network_interface}
    return {**variables, **job.env}


def _train_words(job: HostsJob, node: int) -> list[str]:
    words = [
        *AGENT,
        launch_id(job, job.hosts[node]),
        *job.runner,
        "--nnodes",
        str(len(job.hosts)),
        "--nproc-per-node",
        str(job.procs),
    ]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address(job.hosts[0])}:{job.port}"]
    words += ["--rdzv-id", f"{job.run_name}-{job.attempt}"]
    # Said here, since a host's name may have many forms.
    words += ["--rdzv-conf", f"is_host={'true' if node == 0 else 'false'}", "--local-addr", address(job.hosts[node])]
    words += ["--max-restarts", "0"]  # restarts are decided by the status files, from outside
    words += ["--log-dir", str(job.attempt_folder / "torchrun" / f"node-{node}"), "--tee", "3"]
    return [*words, *job.entry, job.config, *job.overrides]


def address(host: str) -> str:
    """Of `user@host`, the part under which other hosts reach it."""
    return host.rpartition("@")[2]
