"""The record of a run: `metrics.jsonl` and `events.jsonl`, one JSON object per line, flushed line by line. No torch.

Everything else that shows a run (the report, Weights & Biases, `trichord-launch status`) is a copy of these files.
Rank 0 writes them; the event of a fault comes from whichever rank noticed it.

    {"step": 120, "time": 1767225600.0, "train/loss": 2.31, "speed/tokens_per_s": 81234.0}

A name is `room/name_unit`: a room or topic, a slash, and a name that ends in its unit where it has one (`_ms`, `_s`,
`_gib`, `_tokens`, `_frac`, `_per_s`). More slashes split a figure up: `train/loss/next_token`, `data/mix_frac/photos`.
docs/guides/tracking.md lists the names the training loop uses.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trichord.core.log import get_logger

METRICS_FILE = "metrics.jsonl"
DISCARDED_FILE = "metrics.discarded.jsonl"
EVENTS_FILE = "events.jsonl"

_NAME = re.compile(r"[a-z][a-z0-9_]*(/[A-Za-z0-9_.-]+)+")
_logger = get_logger(__name__)


class MetricsWriter:
    """Appends to `metrics.jsonl` of a run folder; on resume first moves what the lost steps wrote out of it.

    folder: the run folder; made if missing.
    resume_step: the step of the checkpoint the run goes on from; None starts from the beginning. Lines with a larger
        step (without a checkpoint: all lines) belong to steps that will be done again. They, and a line that a crash
        tore, go to `metrics.discarded.jsonl`. `discarded` says how many.
    """

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        self._path = Path(folder) / METRICS_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.discarded = _discard_after(self._path, resume_step)
        if self.discarded:
            _logger.info("%d metric lines past step %s moved to %s", self.discarded, resume_step, DISCARDED_FILE)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115  (lives as long as the run)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one line: `step` (optimizer steps done), the time, and the metrics. Non-finite values become null.

        Raises:
            ValueError: a name is not of the form `room/name_unit`.
        """
        for name in metrics:
            if not _NAME.fullmatch(name):
                raise ValueError(f"metric names have the form room/name_unit, such as data/wait_ms; got {name!r}")
        values = {name: _finite(value) for name, value in metrics.items()}
        _append(self._file, {"step": int(step), "time": time.time(), **values})

    def close(self) -> None:
        self._file.close()


class EventsWriter:
    """Appends to `events.jsonl`: what happened when (start, resume, save, evaluation, fault, stop).

    Events are history and stay on resume; `attempt` tells the starts of a run apart.
    """

    def __init__(self, folder: Path, *, attempt: int = 0) -> None:
        path = Path(folder) / EVENTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self._attempt = attempt
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, kind: str, *, step: int | None = None, **facts: Any) -> None:
        """Write one event; what JSON does not know among `facts` becomes text. `time` and `attempt` are added."""
        event = {"time": time.time(), "kind": kind, "step": step, "attempt": self._attempt}
        _append(self._file, {**{name: _jsonable(fact) for name, fact in facts.items()}, **event})

    def close(self) -> None:
        self._file.close()


def append_event(folder: Path, kind: str, *, step: int | None, attempt: int, **facts: Any) -> None:
    """One event from any rank, without an open file: one write at the end of the file, which no other writer can split.

    Raises:
        OSError: it cannot be written.
    """
    event = {"time": time.time(), "kind": kind, "step": step, "attempt": attempt}
    line = json.dumps({**{name: _jsonable(fact) for name, fact in facts.items()}, **event}, allow_nan=False)
    file = os.open(Path(folder) / EVENTS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All metric lines of a run folder as written; null values come back as nan, a torn last line is left out.

    A run folder without metrics gives an empty list.
    """
    rows = [row for row in _rows(Path(folder) / METRICS_FILE) if isinstance(row.get("step"), int)]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run folder in the order written."""
    return list(_rows(Path(folder) / EVENTS_FILE))


def merge_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, ascending; lines that share a step (training, then evaluation) become one, the later wins."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all metrics in `rows`, in the order of their first appearance."""
    return [name for name in dict.fromkeys(key for row in rows for key in row) if "/" in name]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The (steps, values) at which metric `name` was logged."""
    points = [(row["step"], float(row[name])) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _discard_after(path: Path, resume_step: int | None) -> int:
    """Move lines past `resume_step` (None: all), and torn ones, out of `path`; return how many."""
    if not path.exists():
        return 0
    last = -1 if resume_step is None else resume_step
    kept, dropped = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        row = _parse(line)
        if row is None:
            dropped.append(json.dumps({"torn": line}))
        elif resume_step is None or not isinstance(row.get("step"), int) or row["step"] > last:
            dropped.append(line)
        else:
            kept.append(line)
    if not dropped:
        _end_torn_line(path)
        return 0
    # First the copy, then the cut: a crash in between leaves lines twice in the discarded file, never none.
    with open(path.with_name(DISCARDED_FILE), "a", encoding="utf-8") as discarded:
        discarded.write("".join(f"{line}\n" for line in dropped))
        discarded.flush()
        os.fsync(discarded.fileno())
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
    return len(dropped)


def _end_torn_line(path: Path) -> None:
    """Give the last line its newline, so that the next one does not continue it."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def _append(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(
        json.dumps(row, allow_nan=False) + "\n"
    )  # one string, so that a reader of the live file sees whole lines
    file.flush()


def _finite(value: float) -> float | int | None:
    """JSON knows no nan and no infinity: they are written as null."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _jsonable(fact: Any) -> Any:
    if isinstance(fact, Mapping):
        return {str(key): _jsonable(value) for key, value in fact.items()}
    if isinstance(fact, (list, tuple)):
        return [_jsonable(value) for value in fact]
    if fact is None or isinstance(fact, (str, int)) or (isinstance(fact, float) and math.isfinite(fact)):
        return fact
    return str(fact)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            row = _parse(line)
            if row is not None:
                yield row


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
