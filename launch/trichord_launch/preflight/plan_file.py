"""What `trichord plan CONFIG --gpus N --save plan.json` predicted, as far as the preflight uses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.core.json_option import read_json_option

_FORMAT = 1
_AGAIN = "make it again: trichord plan CONFIG --gpus N --save plan.json"


@dataclass(frozen=True)
class Plan:
    """Bytes of one checkpoint, and of device memory that a rank needs (None: not predicted). keys: those of the config
    that both follow from, dotted, and their values as JSON; None where the plan does not say. best: the same with the
    layout that the plan's overlay sets."""

    path: Path
    run: str
    gpus: int
    checkpoint_bytes: int
    device_bytes: int | None
    keys: Mapping[str, Any] | None = None
    best: Plan | None = None

    def of(self, config: RunConfig) -> Plan:
        """The best layout where the config has that, as with the overlay laid over it; else the config's own."""
        if self.best is None or not self.differing(config) or self.best.differing(config):
            return self
        return self.best

    def differing(self, config: RunConfig) -> list[str]:
        """Keys whose values the plan was made with are not the config's, as `key: value in the plan, value now`."""
        now = config.model_dump(mode="json")
        found: dict[str, tuple[Any, Any]] = {}
        for path, value in (self.keys or {}).items():
            there, current = _value_at(now, path)
            if there != path:  # a whole part came or went, named once
                found[there] = ("set", current)
            elif current != value:
                came = value is None and isinstance(current, dict)
                found[path] = (value, "set" if came else current)
        return [f"{path}: {_shown(old)} in the plan, {_shown(new)} now" for path, (old, new) in found.items()]


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        ConfigError: there is none, or it is not of this form.
    """
    return _plan_of(Path(path), read_json_option("--plan", path, _AGAIN))


def _plan_of(path: Path, facts: Any) -> Plan:
    if not isinstance(facts, dict):
        raise ConfigError(f"--plan {path}: not a plan: a {type(facts).__name__} and no mapping; {_AGAIN}")
    if facts.get("format", _FORMAT) != _FORMAT:
        raise ConfigError(f"{path} has plan format {facts['format']!r}, this version reads {_FORMAT}; {_AGAIN}")
    run, gpus, size = facts.get("run"), facts.get("gpus"), _part(path, facts, "checkpoint").get("bytes")
    device = _part(path, {"memory": {}, **facts}, "memory").get("device_bytes")
    if not isinstance(run, str) or not isinstance(gpus, int):
        raise ConfigError(f"--plan {path}: not a plan: it does not say of which run and how many GPUs; {_AGAIN}")
    if not isinstance(size, int) or not isinstance(device, int | None):
        raise ConfigError(f"--plan {path}: not a plan: sizes that are no numbers of bytes; {_AGAIN}")
    plan = Plan(path, run, gpus, size, device, _part(path, facts, "config") if "config" in facts else None)
    best, overlay = facts.get("best"), facts.get("overlay")
    if plan.keys is None or not isinstance(best, dict) or not isinstance(overlay, dict):
        return plan
    rooms = {room: keys for room, keys in overlay.items() if isinstance(keys, dict)}
    laid_over = {f"{room}.{name}": value for room, keys in rooms.items() for name, value in keys.items()}
    needed = best.get("device_bytes")
    needed = needed if isinstance(needed, int) else None
    return replace(plan, best=replace(plan, device_bytes=needed, keys={**plan.keys, **laid_over}))


def _part(path: Path, facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(facts.get(name), dict):
        raise ConfigError(f"--plan {path}: not a plan: it has no {name}; {_AGAIN}")
    return facts[name]


def _value_at(data: Any, path: str) -> tuple[str, Any]:
    """(how far the path leads, the value there): not to its end where a part on the way is not there."""
    parts = path.split(".")
    for number, part in enumerate(parts):
        if not isinstance(data, dict) or part not in data:
            return ".".join(parts[:number]), data
        data = data[part]
    return path, data


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
