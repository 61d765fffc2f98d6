"""`trichord-launch hosts`: a config and a list of hosts -> one torchrun on each, over ssh, supervised from here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trichord.config.cluster import ClusterConfig
from trichord.config.identity import inspect_run_folder, run_path
from trichord.config.load import load_cluster, load_run_config
from trichord.core.errors import ConfigError
from trichord_launch.command import TRAIN_ENTRY, Command, stop_timeout_s
from trichord_launch.host_command import RUNNER, HostsJob, address, as_shell, fan_out
from trichord_launch.hosts_check import clear_hosts, require_fit_hosts
from trichord_launch.job import NodeCheck
from trichord_launch.job_size import require_groups, size_warnings
from trichord_launch.machine import this_machine
from trichord_launch.ports import PORTS
from trichord_launch.record import next_attempt
from trichord_launch.supervise import Reach, StopSignals, supervise, tell
from trichord_launch.verdict import Verdict

_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*")


@dataclass(frozen=True)
class Request:
    """What the user asks for. procs: ranks per host, None: the cluster's GPUs per node, or this machine's.

    ssh_config: a file for `ssh -F`. entry, runner: what ranks and hosts run; tests put in their own.
    """

    config: str
    hosts: tuple[str, ...]
    overrides: Sequence[str] = ()
    cluster: str | None = None
    procs: int | None = None
    ssh_config: Path | None = None
    entry: tuple[str, ...] = TRAIN_ENTRY
    runner: tuple[str, ...] = RUNNER


def read_hosts(named: str | None, file: Path | None) -> tuple[str, ...]:
    """The hosts of `--hosts n1,n2` or of a file with one per line (what follows a name there, such as `slots=8`, is
    left alone, and `#` begins a comment).

    Raises:
        ConfigError: neither or both are given, a name is no host's, or is there twice.
    """
    if (named is None) == (file is None):
        raise ConfigError("name the hosts by --hosts n1,n2 or by --hostfile FILE, one of the two")
    if file is not None:
        try:
            lines = [line.partition("#")[0].split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--hostfile {file} cannot be read: {error}") from error
        hosts = [words[0] for words in lines if words]
    else:
        hosts = [name.strip() for name in (named or "").split(",") if name.strip()]
    addresses = [address(host) for host in hosts]
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"{host!r} is no name of a host; expected such as node1, 10.0.0.7 or user@node1")
        if addresses.count(address(host)) > 1:
            raise ConfigError(f"host {address(host)} is named twice; ranks per host are set by --procs")
    if not hosts:
        raise ConfigError("no host is named")
    return tuple(hosts)


def show_hosts(request: Request) -> str:
    """The commands that `launch_hosts` would start, as shell text; checks the same, writes and connects nothing."""
    job, _ = _prepare(request, _cluster_of(request))
    attempt = next_attempt(job.run_folder)
    return as_shell(replace(job, attempt=attempt, port=_port_of(job.run_name, attempt)))


def launch_hosts(request: Request, *, max_restarts: int = 0, check: NodeCheck | None = None) -> Verdict:
    """Look at the hosts, then train on them until the run finishes, is stopped, or fails for good.

    check: what each host must pass; None: the cluster file's, or its defaults.

    Raises:
        ConfigError: the config or an option is wrong, or another launcher holds the run.
        MachineError: a host cannot be reached, or is not fit.
        CheckpointError: the config does not fit the run that stands in its folder.
    """
    cluster = _cluster_of(request)
    job, resume = _prepare(request, cluster)
    limits = cluster.node_check.model_dump() if cluster is not None else {}
    look = check or NodeCheck(**limits, commit=True)
    attempts = _Attempts(replace(job, begin_s=look.timeout_s), resume)

    def prepare(signals: StopSignals) -> None:
        attempts.port = require_fit_hosts(attempts.numbered(next_attempt(job.run_folder)), look, signals)

    def clear(attempt: int, verdict: Verdict, signals: StopSignals) -> str:
        return clear_hosts(attempts.numbered(attempt), list(verdict.hosts_lost), look.timeout_s, signals)

    reach = Reach(prepare, _ask, _kill, clear)
    facts = {"hosts": job.hosts, "ranks_per_node": job.procs}
    return supervise(job.run_folder, attempts.command, max_restarts=max_restarts, reach=reach, facts=facts)


class _Attempts:
    """The commands of one launch. port: free on the first host when it was looked at."""

    def __init__(self, job: HostsJob, resume: str):
        self.job, self.resume, self.first = job, resume, next_attempt(job.run_folder)
        self.port = _port_of(job.run_name, self.first)

    def numbered(self, attempt: int) -> HostsJob:
        """The job of that attempt, at a port that the one before did not have."""
        port = PORTS.start + (self.port - PORTS.start + 7 * (attempt - self.first)) % len(PORTS)
        return replace(self.job, attempt=attempt, port=port)

    def command(self, attempt: int, restart: bool) -> Command:
        # The first start has made the run; `never` would refuse it on the second.
        again = ("run.resume=auto",) if restart and self.resume == "never" else ()
        job = self.numbered(attempt)
        return fan_out(replace(job, overrides=(*job.overrides, *again)), sys.executable)


def _cluster_of(request: Request) -> ClusterConfig | None:
    return load_cluster(request.cluster) if request.cluster is not None else None


def _prepare(request: Request, cluster: ClusterConfig | None) -> tuple[HostsJob, str]:
    """(the job, with attempt 1, and the config's `run.resume`). What can be wrong here is said here."""
    config = load_run_config(request.config, request.overrides)
    inspect_run_folder(config)
    if request.procs is not None and request.procs < 1:
        raise ConfigError(f"--procs must be at least 1, got {request.procs}")
    if request.ssh_config is not None and not request.ssh_config.is_file():
        raise ConfigError(f"--ssh-config {request.ssh_config}: no such file")
    machine = this_machine()
    gpus = cluster.gpus_per_node if cluster is not None else machine.gpus
    procs = request.procs if request.procs is not None else max(1, gpus)
    chosen = (cluster.env if cluster is not None else {}).get("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR"))
    # Without a cluster file, a machine without GPUs knows nothing of those of the hosts.
    on_gpus = chosen != "cpu" and (gpus > 0 or None)
    if cluster is not None and on_gpus and procs > gpus:
        raise ConfigError(f"--procs {procs} needs {procs} GPUs per host, the cluster file says {gpus}")
    require_groups(config, procs * len(request.hosts))
    for said in size_warnings(config, procs * len(request.hosts), procs):
        tell(f"warning: {said}")
    path = Path(request.config)
    ssh = ("ssh", "-F", str(request.ssh_config.absolute())) if request.ssh_config is not None else ("ssh",)
    job = HostsJob(
        run_folder=run_path(config).absolute(),
        run_name=config.run.name,
        config=str(path.absolute()) if path.is_file() else request.config,
        overrides=tuple(request.overrides),
        hosts=request.hosts,
        procs=procs,
        attempt=1,
        port=_port_of(config.run.name, 1),
        cwd=Path.cwd(),
        python=(cluster.python if cluster is not None else None) or sys.executable,
        ssh=ssh,
        gpus=on_gpus,
        stop_timeout_s=stop_timeout_s(config),
        runner=request.runner,
        entry=request.entry,
        **_cluster_facts(cluster),
    )
    return job, config.run.resume


def _cluster_facts(cluster: ClusterConfig | None) -> dict:
    if cluster is None:
        return {}
    return {
        "modules": cluster.modules,
        "setup": cluster.setup,
        "env": cluster.env,
        "network_interface": cluster.network_interface,
    }


def _port_of(run_name: str, attempt: int) -> int:
    """A port that other runs, and the attempt before, hardly have."""
    return PORTS.start + (zlib.crc32(run_name.encode()) + attempt * 7) % len(PORTS)


def _ask(fan_out_pid: int) -> str:
    """A stop, for all hosts; how many ranks they have reached is in their logs."""
    os.kill(fan_out_pid, signal.SIGTERM)
    return "asked all hosts to save and stop"


def _kill(process: subprocess.Popen) -> None:
    """At once, on all hosts: the agents there are told before the connections go."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=40)
    except subprocess.TimeoutExpired:
        process.kill()
