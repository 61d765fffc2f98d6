"""`trichord-launch hosts`: a config and a list of hosts -> one torchrun on each, over ssh, supervised from here."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from trichord.config.cluster import ClusterConfig
from trichord.config.identity import inspect_run_folder, run_path
from trichord.config.load import load_cluster, load_run_config
from trichord.core.errors import ConfigError
from trichord_launch.command import TRAIN_ENTRY, Command, stop_timeout_s
from trichord_launch.host_command import RUNNER, HostsJob, address, as_shell, fan_out, ssh_command
from trichord_launch.job import NodeCheck
from trichord_launch.machine import this_machine
from trichord_launch.node_problems import Asked, Report, bad_nodes
from trichord_launch.record import next_attempt, read_json
from trichord_launch.steps import PORTS, check_words
from trichord_launch.supervise import run_lock, supervise
from trichord_launch.verdict import Verdict

_HOST = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9_.:-]*")
_LIMIT_MARGIN_S = 10.0  # the host ends its check by itself; this is for one that does not answer at all
_AT_ONCE = 32  # hosts that are looked at side by side


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
    return as_shell(replace(job, attempt=next_attempt(job.run_folder)))


def launch_hosts(request: Request, *, max_restarts: int = 0, check: NodeCheck | None = None) -> Verdict:
    """Look at the hosts, then train on them until the run finishes, is stopped, or fails for good.

    check: what each host must pass; None: the cluster file's, or its defaults.

    Raises:
        ConfigError: the config or an option is wrong, a host cannot be reached or is not fit, or another launcher
            holds the run.
        CheckpointError: the config does not fit the run that stands in its folder.
    """
    cluster = _cluster_of(request)
    job, resume = _prepare(request, cluster)
    limits = cluster.node_check.model_dump() if cluster is not None else {}
    with run_lock(job.run_folder):  # a second launcher is told at once, and finds no half-written token
        require_fit_hosts(job, check or NodeCheck(**limits, commit=True))

    def command_of(attempt: int, restart: bool) -> Command:
        # The first start has made the run; `never` would refuse it on the second.
        again = ("run.resume=auto",) if restart and resume == "never" else ()
        now = replace(job, attempt=attempt, port=_port_of(job.run_name, attempt), overrides=(*job.overrides, *again))
        return fan_out(now, sys.executable)

    facts = {"hosts": job.hosts, "ranks_per_node": job.procs}
    return supervise(job.run_folder, command_of, max_restarts=max_restarts, ask=_ask, kill=_kill, facts=facts)


def require_fit_hosts(job: HostsJob, check: NodeCheck) -> None:
    """Look at all hosts at once: versions, clocks, devices, space, and that they see this very run folder.

    Raises:
        ConfigError: what is wrong, host by host.
    """
    folder = job.run_folder / "hosts_check" / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / "token"
    token.write_text(f"{os.getpid()}-{time.time_ns()}\n", encoding="utf-8")
    check = replace(check, token=(str(token), token.read_text(encoding="utf-8").strip()))
    gpus = job.procs if job.gpus else 0
    began = time.time()

    def ask(host: str) -> tuple[str, Report | None]:
        own = folder / host  # hosts may think they all have one name
        words = check_words(check, own, str(job.run_folder), gpus)
        return _ask_host(ssh_command(job, host, words, check.timeout_s), own, check.timeout_s)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(job.hosts, pool.map(ask, job.hosts), strict=True))
    silent = [f"  {host}: {said}" for host, (said, report) in answers.items() if report is None]
    reports = {host: report for host, (_, report) in answers.items() if report is not None}
    bad = bad_nodes(reports, Asked(began, time.time(), check.max_clock_skew_s))
    bad |= {host: why for host, report in reports.items() if host not in bad and (why := _lacks_torch(job, report))}
    told = [*silent, *(f"  {host}: {why}" for host, why in bad.items())]
    if told:
        many = f"{len(told)} of {len(job.hosts)} hosts"
        raise ConfigError(f"{many} cannot train; leave them out, or mend them:\n" + "\n".join(told))


def _lacks_torch(job: HostsJob, report: Report) -> str:
    if report.get("versions", {}).get("torch", "any") is not None:
        return ""
    return f"{job.python} has no torch there; name another interpreter by `python` in a cluster file"


def _ask_host(command: list[str], folder: Path, timeout_s: float) -> tuple[str, Report | None]:
    """(what went wrong, None), or ("", what the host says of itself)."""
    folder.mkdir(parents=True, exist_ok=True)
    late = f"it did not answer within {timeout_s:g} s (node_check.timeout_s)"
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # whatever a login shell may print
            timeout=timeout_s + _LIMIT_MARGIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return late, None
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}; is OpenSSH's client installed here?", None
    written = sorted(folder.glob("*.json"))
    if done.returncode == 0 and written:
        return "", read_json(written[0])
    said = " ".join(done.stderr.strip().splitlines()[-1:])[:300]
    if done.returncode == 255:
        return f"ssh cannot reach it ({said}); `ssh -o BatchMode=yes HOST true` must work without a password", None
    if done.returncode in (124, 137):
        return late, None
    if done.returncode == 0:
        return f"it does not share {folder} with this machine; put run.root on a file system that all hosts see", None
    return f"its check ended with {done.returncode} ({said or 'it said nothing'})", None


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
