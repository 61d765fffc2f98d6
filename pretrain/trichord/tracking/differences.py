"""Where the configs of several runs differ. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NOT_SET = object()


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """(key, its value in each config) of every key that is not the same in all; the run's own name and place left out.

    Elements of lists go by their `name` where they have one, so that a source is compared with itself.
    """
    flat = [dict(_leaves(config, "")) for config in configs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    found = []
    for key in keys:
        values = [one.get(key, _NOT_SET) for one in flat]
        if key not in ("run.name", "run.root") and any(value != values[0] for value in values):
            found.append((key, ["not set" if value is _NOT_SET else _shown(value) for value in values]))
    return found


def _leaves(value: Any, path: str):
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        for inner in value:
            yield from _leaves({k: v for k, v in inner.items() if k != "name"}, f"{path}.{inner['name']}")
    else:
        yield path, value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
