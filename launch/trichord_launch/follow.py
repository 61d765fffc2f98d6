"""`trichord-launch status` and `logs`: what a run is doing, from the files in its folder alone."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.status import read_rank_statuses, read_status
from trichord_launch.control import job_ids, queued_jobs
from trichord_launch.record import OF_A_RUN, attempt_numbers, is_run_folder, read_json
from trichord_launch.supervise import is_held
from trichord_launch.verdict import last_metrics

T = TypeVar("T")
_SHOWN_METRICS = ("train/loss", "speed/tokens_per_s", "train/grad_norm")


def find_run(run: str, root: Path = Path("runs")) -> Path:
    """The folder of a run given as a path or as a name under `runs/`.

    Raises:
        ConfigError: no such run, and names the nearest; or a folder that is no run's.
    """
    places = [folder for folder in (Path(run).expanduser(), root / run) if folder.is_dir()]
    for folder in places:
        if is_run_folder(folder):
            return folder
    if places:
        inside = sorted(path.name for path in places[0].iterdir() if path.is_dir() and is_run_folder(path))
        hint = f"; runs in it: {', '.join(inside[:5])}" if inside else f"; a run's holds {', '.join(OF_A_RUN[:4])}"
        raise ConfigError(f"{places[0]} is no run folder{hint}")
    known = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    near = difflib.get_close_matches(run, known, n=3, cutoff=0.3) or known[:3]
    hint = f"; nearest: {', '.join(near)}" if near else f"; {root.absolute()} holds no runs"
    raise ConfigError(f"no run {run!r}: expected the path of a run folder, or the name of one under {root}/{hint}")


def run_status(folder: Path) -> dict[str, Any]:
    """What is known of a run, as plain data for `--json` and for `render_status`."""
    broken: list[str] = []
    status = _unless_broken(lambda: read_status(folder), None, broken)
    ranks = _unless_broken(lambda: read_rank_statuses(folder), {}, broken)
    known = _unless_broken(lambda: job_ids(folder), [], broken)
    jobs = queued_jobs(folder) if known else []
    verdicts = {n: read_json(folder / "attempts" / str(n) / "verdict.json") for n in attempt_numbers(folder)}
    return {
        "run": folder.name,
        "folder": str(folder),
        "status": vars(status) if status else None,
        "broken": broken,
        "launcher_alive": is_held(folder) or any(job.state == "RUNNING" for job in jobs),
        "jobs": [vars(job) for job in jobs],
        "job_ids": known,
        "total_steps": _total_steps(folder),
        "checkpoints": sorted(p.parent.name for p in (folder / "checkpoints").glob("step-*/manifest.json")),
        "last_metrics": last_metrics(folder),
        "failed_ranks": {rank: vars(rank_status) for rank, rank_status in ranks.items()},
        "attempts": {number: verdict for number, verdict in verdicts.items() if verdict},
    }


def _unless_broken(read: Callable[[], T], otherwise: T, broken: list[str]) -> T:
    """What a file says; where somebody broke it, that goes to `broken`, and the other files are still told."""
    try:
        return read()
    except TrichordError as error:
        broken.append(str(error))
        return otherwise


def render_status(facts: dict[str, Any], now: float | None = None) -> str:
    """`run_status` as lines for a person."""
    now = time.time() if now is None else now
    status, metrics = facts["status"], facts["last_metrics"]
    lines = [f"run         {facts['run']}  ({facts['folder']})"]
    lines += [*(f"broken      {said}" for said in facts["broken"]), *_job_lines(facts)]
    if status is None:
        said = "outcome     not known" if facts["broken"] else "outcome     not started"
        return "\n".join([*lines, said, *_attempt_lines(facts)])
    outcome = status["outcome"]
    if outcome == "running" and not facts["launcher_alive"]:
        outcome = (
            "running, says its status, but no launcher here holds it and no job: it died, or was started otherwise"
        )
    reason = f": {status['reason']}" if status["reason"] else ""
    lines.append(f"outcome     {outcome}{reason}  ({_age(now - status['time'])} ago)")
    step = max(status["step"], metrics.get("step", -1))
    lines.append(f"step        {step if step >= 0 else '-'} of {facts['total_steps'] or '?'}")
    shown = [f"{name} {metrics[name]:.5g}" for name in _SHOWN_METRICS if isinstance(metrics.get(name), (int, float))]
    if shown:
        when = f", {_age(now - metrics['time'])} ago" if isinstance(metrics.get("time"), int | float) else ""
        lines.append(f"metrics     {', '.join(shown)}  (step {metrics['step']}{when})")
    if facts["checkpoints"]:
        lines.append(f"checkpoint  {facts['checkpoints'][-1]}  ({len(facts['checkpoints'])} kept)")
    for rank, rank_status in facts["failed_ranks"].items():
        lines.append(f"rank {rank:<6} failed at step {rank_status['step']}: {rank_status['reason']}")
    return "\n".join([*lines, *_attempt_lines(facts)])


def _attempt_lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    for number, verdict in facts["attempts"].items():
        after = f" after {_age(verdict['seconds'])}" if isinstance(verdict.get("seconds"), int | float) else ""
        why = f"; {verdict.get('next', '?')}: {verdict['why']}" if verdict.get("why") else ""
        lines.append(
            f"attempt {number:<3} {verdict.get('outcome', '?')} at step {verdict.get('step', '?')}{after}: "
            f"{verdict.get('reason', '?')}{why}"
        )
    return lines


def _job_lines(facts: dict[str, Any]) -> list[str]:
    """Where the run stands in Slurm's queue, if it was ever submitted."""
    lines = []
    for job in facts["jobs"]:
        if job["state"] == "RUNNING":
            where = f"on {job['nodes']} for {job['elapsed']}, {job['time_left']} left"
        else:
            where = f"({job['reason']})" + (f", expected to start {job['start']}" if job["start"] != "N/A" else "")
        lines.append(f"job         {job['job_id']} {job['state'].lower()} {where}")
    if not lines and facts["job_ids"]:
        lines.append(f"job         {facts['job_ids'][0]}, not in the queue here any more")
    return lines


def log_file(folder: Path, rank: int) -> Path:
    """The log of a rank: its own file, or what was caught of it where the rank died before it had one.

    Raises:
        ConfigError: there is neither.
    """
    own = folder / "logs" / f"rank-{rank:05d}.log"
    if own.is_file():
        return own
    caught = [path for number in attempt_numbers(folder) for path in _caught(folder / "attempts" / str(number), rank)]
    if caught:
        return max(caught, key=lambda path: path.stat().st_mtime)
    known = sorted(path.name for path in (folder / "logs").glob("rank-*.log"))
    raise ConfigError(f"{folder} has no log of rank {rank}; there are: {', '.join(known) or 'none'}")


def job_log(folder: Path) -> Path:
    """What the batch process of the newest job wrote: starts, stops, decisions.

    Raises:
        ConfigError: there is none.
    """
    logs = [path for path in folder.glob("submissions/*/*.log") if path.is_file()]
    if not logs:
        raise ConfigError(f"{folder} has no log of a job; it was not submitted, or has not started yet")
    return max(logs, key=lambda path: path.stat().st_mtime)


def _caught(record: Path, rank: int) -> list[Path]:
    """What torchrun (on this machine, or on the rank's node) or srun wrote down of a rank's output in one attempt."""
    per_node = read_json(record / "command.json").get("ranks_per_node")
    node, local = divmod(rank, per_node if isinstance(per_node, int) and per_node > 0 else 1)
    return [
        *record.glob(f"torchrun/*/attempt_*/{rank}/stderr.log"),
        *record.glob(f"torchrun/node-{node}/*/attempt_*/{local}/stderr.log"),
        *record.glob(f"rank-{rank}.log"),
    ]


def tail(path: Path, lines: int, follow: bool, poll_s: float = 0.3) -> Iterator[str]:
    """The last `lines` lines of a file, then, with `follow`, whatever is appended, for ever."""
    with open(path, encoding="utf-8", errors="replace") as file:
        yield "".join(file.readlines()[-lines:] if lines else [])
        while follow:
            text = file.read()
            if text:
                yield text
            else:
                time.sleep(poll_s)


def _total_steps(folder: Path) -> int | None:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
