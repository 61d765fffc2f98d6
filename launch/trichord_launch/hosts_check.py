"""Hosts over ssh: looked at before ranks are started on them, and cleared of ranks when one was lost."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from trichord_launch.host_command import HostsJob, launch_id, ssh_command
from trichord_launch.job import NodeCheck
from trichord_launch.machine import MachineError
from trichord_launch.node_problems import Asked, Report, bad_nodes
from trichord_launch.record import read_json
from trichord_launch.steps import check_words
from trichord_launch.supervise import StopSignals, tell

_LIMIT_MARGIN_S = 10.0  # the host ends its check by itself; this is for one that does not answer at all
_AT_ONCE = 32  # hosts that are looked at side by side
_LEAVE_S = 60.0  # ranks whose peers are gone leave within engine.heartbeat_timeout_s; after this they are ended
_BACK_S = 180.0  # a host may take so long to be reached again
_TRY_EVERY_S = 5.0


def require_fit_hosts(job: HostsJob, check: NodeCheck, signals: StopSignals) -> int:
    """Look at all hosts at once: versions, clocks, devices, space, and that they see this very run folder.

    Returns a port that is free on the first host, the job's own where that is; meaningless where a stop came.

    Raises:
        MachineError: what is wrong, host by host.
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
        words += ["--port", str(job.port)] if host == job.hosts[0] else []
        command = ssh_command(job, host, words, check.timeout_s)
        return ask_host(command, own, check.timeout_s, lambda: bool(signals.received))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = dict(zip(job.hosts, pool.map(ask, job.hosts), strict=True))
    if signals.received:
        return job.port
    silent = [f"  {host}: {said}" for host, (said, report) in answers.items() if report is None]
    reports = {host: report for host, (_, report) in answers.items() if report is not None}
    bad = bad_nodes(reports, Asked(began, time.time(), check.max_clock_skew_s))
    bad |= {host: why for host, report in reports.items() if host not in bad and (why := _lacks_torch(job, report))}
    told = [*silent, *(f"  {host}: {why}" for host, why in bad.items())]
    if told:
        many = f"{len(told)} of {len(job.hosts)} hosts"
        raise MachineError(f"{many} cannot train; leave them out, or mend them:\n" + "\n".join(told))
    port = int(reports[job.hosts[0]].get("port") or job.port)
    if port != job.port:
        tell(f"port {job.port} is in use on {job.hosts[0]}; ranks meet at {port}")
    return port


def _lacks_torch(job: HostsJob, report: Report) -> str:
    if report.get("versions", {}).get("torch", "any") is not None:
        return ""
    return f"{job.python} has no torch there; name another interpreter by `python` in a cluster file"


def ask_host(
    command: list[str], folder: Path, timeout_s: float, stopped: Callable[[], bool] = lambda: False
) -> tuple[str, Report | None]:
    """(what went wrong, None), or ("", what the host says of itself)."""
    folder.mkdir(parents=True, exist_ok=True)
    if said := _run(command, timeout_s, "its check", stopped):
        return said, None
    written = sorted(folder.glob("*.json"))
    if not written:
        return f"it does not share {folder} with this machine; put run.root on a file system that all hosts see", None
    return "", read_json(written[0])


def clear_hosts(job: HostsJob, hosts: list[str], timeout_s: float, signals: StopSignals) -> str:
    """See that nothing of this attempt is left on these hosts: ranks leave by themselves, or are ended.

    Returns why not, and what to do; empty where nothing is left.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(lambda host: _clear_host(job, host, timeout_s, signals), hosts)
        left = [f"{host}: {said}" for host, said in zip(hosts, answers, strict=True) if said]
    if not left:
        return ""
    return f"ranks may be left on a host ({'; '.join(left)}); see that none is"


def _clear_host(job: HostsJob, host: str, timeout_s: float, signals: StopSignals) -> str:
    words = ["-m", "trichord_launch.processes", launch_id(job, host), f"{_LEAVE_S:g}"]
    limit_s = timeout_s + _LEAVE_S
    deadline = time.monotonic() + _BACK_S
    while said := _run(
        ssh_command(job, host, words, limit_s), limit_s, "looking there", lambda: bool(signals.received)
    ):
        if time.monotonic() > deadline or signals.pause(_TRY_EVERY_S):
            return said
    return ""


def _run(command: list[str], timeout_s: float, what: str, stopped: Callable[[], bool]) -> str:
    """Empty where it ended well; else what went wrong, as far as ssh and the host say."""
    late = f"{what} took more than {timeout_s:g} s; node_check.timeout_s sets the limit"
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # whatever a login shell may print
        )
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}; is OpenSSH's client installed here?"
    stderr = _wait(process, timeout_s + _LIMIT_MARGIN_S, stopped)
    if stderr is None:
        return late
    said = " ".join(stderr.strip().splitlines()[-1:])[:300]
    if process.returncode == 255:
        return f"ssh cannot reach it ({said}); `ssh -o BatchMode=yes HOST true` must work without a password"
    if process.returncode in (124, 137):
        return late
    return f"{what} ended with {process.returncode} ({said or 'it said nothing'})" if process.returncode else ""


def _wait(process: subprocess.Popen[str], limit_s: float, stopped: Callable[[], bool]) -> str | None:
    """What it said on its error output; None where it was ended before, since it is late or a stop came."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return process.communicate(timeout=0.2)[1]
        except subprocess.TimeoutExpired:
            if stopped() or time.monotonic() > deadline:
                process.kill()
                process.communicate()
                return None
