"""What a run folder holds, gathered for showing: metrics, events, status, config, results. Only reads. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.status import Status, read_status
from trichord.tracking.metrics import DISCARDED_FILE, merge_steps, read_events, read_metrics

Series = tuple[list[int], list[float]]  # steps, ascending, and values


@dataclass(frozen=True)
class RunRecord:
    """The files of one run. rows: one per step, ascending; missing files give empty values.

    broken: what is wrong with files that had to be left out, one line each.
    """

    folder: Path
    name: str
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    status: Status | None
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    data: dict[str, Any]
    quarantine: list[dict[str, Any]]
    discarded_lines: int
    broken: tuple[str, ...] = ()

    @cached_property
    def columns(self) -> dict[str, Series]:
        """Metric name -> the steps and values at which it was logged; names by their first appearance.

        Gathered once: a page asks for each of them several times, and a long run has very many rows.
        """
        found: dict[str, Series] = {}
        for row in self.rows:
            step = row["step"]
            for name, value in row.items():
                if "/" in name and isinstance(value, (int, float)):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
        return found

    @property
    def names(self) -> list[str]:
        return list(self.columns)

    def series(self, name: str) -> Series:
        """The steps and values of a metric; empty where it was never logged."""
        return self.columns.get(name, ([], []))

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which a start went on from a checkpoint."""
        return sorted({event["step"] for event in self.events if event.get("kind") == "start" and event.get("step")})

    @property
    def attempts(self) -> int:
        """How often the run was started."""
        return max(1, sum(event.get("kind") == "start" for event in self.events))

    @property
    def last_sign(self) -> float | None:
        """When the run last wrote a metric, an event or its status, in seconds since the epoch."""
        lines = [*self.rows[-1:], *self.events[-1:]]
        times = [time for line in lines if isinstance(time := line.get("time"), (int, float))]
        return max([*times, *([self.status.time] if self.status and self.status.time else [])], default=None)

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        return self.last_finite(name)[1]

    def last_finite(self, name: str) -> tuple[int | None, float | None]:
        """The last finite value of a metric, after its step."""
        points = reversed(list(zip(*self.series(name))))
        return next(((step, value) for step, value in points if math.isfinite(value)), (None, None))

    def typical(self, name: str) -> float | None:
        """Median of a metric over the second half of the run, where it has settled."""
        values = [value for value in self.series(name)[1] if math.isfinite(value)]
        return median(values[len(values) // 2 :]) if values else None

    def largest(self, prefix: str) -> float | None:
        """Largest finite value of any metric whose name starts with `prefix`."""
        values = [v for name in self.names if name.startswith(prefix) for v in self.series(name)[1]]
        return max((value for value in values if math.isfinite(value)), default=None)

    @property
    def non_finite(self) -> int:
        """Log steps whose loss was nan or infinite."""
        return sum(not math.isfinite(value) for value in self.series("train/loss")[1])

    def target_mix(self) -> dict[str, float]:
        """Source name -> the share of draws it should have: as logged, each log step weighing the same; else by the
        configured weights."""
        if logged := self._means("data/mix_target_frac/"):
            return logged
        sources = _get(self.config, "shards", "sources")
        named = [source for source in sources if isinstance(source, Mapping)] if isinstance(sources, list) else []
        weights = {str(source.get("name")): source.get("weight", 1.0) for source in named}
        weights = {name: weight for name, weight in weights.items() if isinstance(weight, (int, float))}
        total = sum(weights.values()) or 1.0
        return {name: weight / total for name, weight in weights.items()}

    def drawn_mix(self) -> dict[str, float]:
        """Source name -> share of draws over all log steps, each weighing the same."""
        return self._means("data/mix_frac/")

    def counts(self, name: str) -> dict[str, int]:
        """One of the tables in `data.json`: what is counted -> how often, up to the last checkpoint."""
        table = self.data.get(name)
        found = table.items() if isinstance(table, Mapping) else ()
        return {str(key): count for key, count in found if isinstance(count, int)}

    def bad_by_reason(self) -> list[tuple[str, int]]:
        """Quarantined samples by reason, most frequent first."""
        return Counter(str(line.get("reason", "?")) for line in self.quarantine).most_common()

    def _means(self, prefix: str) -> dict[str, float]:
        names = [name for name in self.names if name.startswith(prefix)]
        means = {name.removeprefix(prefix): _mean(self.series(name)[1]) for name in names}
        return {name: mean for name, mean in means.items() if mean is not None}


def read_record(folder: Path) -> RunRecord:
    """Gather a run folder. A file that is torn or no longer valid is left out, and told in `broken`.

    Raises:
        ConfigError: the folder has neither metrics nor a config: it is no run; or its files cannot be read.
    """
    folder = Path(folder)
    try:
        return _gather(folder)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def _gather(folder: Path) -> RunRecord:
    rows, (config, wrong) = merge_steps(read_metrics(folder)), _config(folder / "config.yaml")
    if not rows and not config and not wrong:
        raise ConfigError(f"{folder} is no run folder: expected metrics.jsonl or config.yaml in it")
    return RunRecord(
        folder=folder,
        name=str(_get(config, "run", "name") or folder.resolve().name),
        rows=rows,
        events=read_events(folder),
        status=_status(folder),
        config=config,
        environment=_json(folder / "environment.json"),
        result=_json(folder / "result.json"),
        data=_json(folder / "data.json"),
        quarantine=_lines(folder / "quarantine.jsonl"),
        discarded_lines=len(_lines(folder / DISCARDED_FILE)),
        broken=(wrong,) if wrong else (),
    )


def _status(folder: Path) -> Status | None:
    try:
        return read_status(folder)
    except TrichordError:  # a page about a run with a broken status is better than no page
        return None


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _get(values: Any, *path: str) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _config(path: Path) -> tuple[dict[str, Any], str]:
    """The config of a run, and what is wrong with its file: one line, empty where nothing is."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except UnicodeDecodeError:
        return {}, "config.yaml is no text, and is left out"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return {}, f"config.yaml is no YAML{f' (line {mark.line + 1})' if mark else ''}, and is left out"
    if not isinstance(value, dict):
        return {}, "config.yaml holds no config, and is left out"
    return value, ""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file; what is no JSON (torn by a crash) is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [value for value in found if isinstance(value, dict)]
