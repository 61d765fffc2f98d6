"""What `trichord plan CONFIG --gpus N --save plan.json` predicted, as far as the preflight uses it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trichord.core.errors import ConfigError

_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Bytes of one checkpoint, and of device memory that a rank needs (None: not predicted)."""

    path: Path
    run: str
    gpus: int
    checkpoint_bytes: int
    device_bytes: int | None


def read_plan(path: Path) -> Plan:
    """The plan in a file.

    Raises:
        ConfigError: there is none, or it is not of this form.
    """
    again = "make it again: trichord plan CONFIG --gpus N --save plan.json"
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        if facts.get("format", _FORMAT) != _FORMAT:
            raise ConfigError(f"{path} has plan format {facts['format']!r}, this version reads {_FORMAT}; {again}")
        memory = facts.get("memory") or {}
        needed = memory.get("device_bytes")
        size = int(facts["checkpoint"]["bytes"])
        return Plan(Path(path), str(facts["run"]), int(facts["gpus"]), size, None if needed is None else int(needed))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; {again}") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{path} is no plan that can be read ({type(error).__name__}: {error}); {again}") from error
