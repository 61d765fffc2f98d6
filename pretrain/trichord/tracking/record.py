"""What a run folder holds, gathered for showing: metrics, events, status, config, results. Only reads. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trichord.core.errors import ConfigError, TrichordError
from trichord.core.status import Status, read_status
from trichord.tracking.metrics import (
    DISCARDED_FILE,
    merge_steps,
    metric_names,
    read_events,
    read_metrics,
    series,
)


@dataclass(frozen=True)
class RunRecord:
    """The files of one run. rows: one per step, ascending; missing files give empty values."""

    folder: Path
    name: str
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    status: Status | None
    config: dict[str, Any]
    environment: dict[str, Any]
    result: dict[str, Any]
    quarantine: list[dict[str, Any]]
    discarded_lines: int

    @property
    def names(self) -> list[str]:
        return metric_names(self.rows)

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which a start went on from a checkpoint."""
        return sorted({event["step"] for event in self.events if event.get("kind") == "start" and event.get("step")})

    @property
    def attempts(self) -> int:
        """How often the run was started."""
        return max(1, sum(event.get("kind") == "start" for event in self.events))

    def last(self, name: str) -> float | None:
        """The last finite value of a metric."""
        values = [value for value in series(self.rows, name)[1] if math.isfinite(value)]
        return values[-1] if values else None

    def typical(self, name: str) -> float | None:
        """Median of a metric over the second half of the run, where it has settled."""
        values = [value for value in series(self.rows, name)[1] if math.isfinite(value)]
        return median(values[len(values) // 2 :]) if values else None

    def largest(self, prefix: str) -> float | None:
        """Largest finite value of any metric whose name starts with `prefix`."""
        values = [v for name in self.names if name.startswith(prefix) for v in series(self.rows, name)[1]]
        return max((value for value in values if math.isfinite(value)), default=None)

    @property
    def non_finite(self) -> int:
        """Log steps whose loss was nan or infinite."""
        return sum(not math.isfinite(value) for value in series(self.rows, "train/loss")[1])

    def target_mix(self) -> dict[str, float]:
        """Source name -> configured share of draws."""
        sources = _get(self.config, "shards", "sources") or []
        weights = {source["name"]: float(source.get("weight", 1.0)) for source in sources}
        total = sum(weights.values()) or 1.0
        return {name: weight / total for name, weight in weights.items()}

    def drawn_mix(self) -> dict[str, float]:
        """Source name -> share of draws over all log steps, each weighing the same."""
        prefix = "data/mix_frac/"
        names = [name for name in self.names if name.startswith(prefix)]
        means = {name.removeprefix(prefix): _mean(series(self.rows, name)[1]) for name in names}
        return {name: mean for name, mean in means.items() if mean is not None}

    def bad_by_reason(self) -> list[tuple[str, int]]:
        """Quarantined samples by reason, most frequent first."""
        return Counter(str(line.get("reason", "?")) for line in self.quarantine).most_common()


def read_record(folder: Path) -> RunRecord:
    """Gather a run folder.

    Raises:
        ConfigError: the folder has neither metrics nor a config: it is no run.
    """
    folder = Path(folder)
    rows, config = merge_steps(read_metrics(folder)), _yaml(folder / "config.yaml")
    if not rows and not config:
        raise ConfigError(f"{folder} is no run folder: expected metrics.jsonl or config.yaml in it")
    return RunRecord(
        folder=folder,
        name=str(_get(config, "run", "name") or folder.name),
        rows=rows,
        events=read_events(folder),
        status=_status(folder),
        config=config,
        environment=_json(folder / "environment.json"),
        result=_json(folder / "result.json"),
        quarantine=_lines(folder / "quarantine.jsonl"),
        discarded_lines=len(_lines(folder / DISCARDED_FILE)),
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


def _yaml(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return value if isinstance(value, dict) else {}


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
