"""Labels and numbers of a sample, from its json member, for objectives that classify or regress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trichord.samples.config import TargetConfig
from trichord.samples.text import value_at
from trichord.shards.quarantine import BadSample

_NO_VALUES, _NONE_PRESENT = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool)
_LARGEST = float(np.finfo(np.float32).max)


def read_targets(meta: Mapping[str, Any], targets: Mapping[str, TargetConfig]) -> tuple[np.ndarray, np.ndarray]:
    """(values, present) of one sample: values (C,) float32, the columns of all targets side by side in the order of the
    config (one column for `class` and `number`, one per class, 0 or 1, for `classes`); present (N,) bool per target.

    Raises:
        BadSample: a value is there and is not of its kind, or names a class that there is none of.
    """
    if not targets:
        return _NO_VALUES, _NONE_PRESENT
    values: list[np.ndarray] = []
    present = np.zeros(len(targets), dtype=bool)
    for number, (name, target) in enumerate(targets.items()):
        value = value_at(meta, target.key)
        columns = np.zeros(target.size if target.kind == "classes" else 1, dtype=np.float32)
        if value is not None:
            present[number] = True
            _fill(columns, value, name, target)
        values.append(columns)
    return np.concatenate(values), present


def count_columns(targets: Mapping[str, TargetConfig]) -> int:
    """Columns of `PackedBatch.targets`."""
    return sum(target.size if target.kind == "classes" else 1 for target in targets.values())


def _fill(columns: np.ndarray, value: Any, name: str, target: TargetConfig) -> None:
    if target.kind == "number":
        # not math.isfinite: a huge integer is none for it
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise BadSample(f"target {name}: `{target.key}` must be a finite float32 number, got {_described(value)}")
        columns[0] = value
    elif target.kind == "class":
        columns[0] = _class_number(value, name, target)
    elif isinstance(value, list):
        for one in value:
            columns[_class_number(one, name, target)] = 1
    else:
        raise BadSample(f"target {name}: `{target.key}` must be a list of classes, got {_described(value)}")


def _class_number(value: Any, name: str, target: TargetConfig) -> int:
    if target.names:
        if not isinstance(value, str) or value not in target.names:
            raise BadSample(
                f"target {name}: `{target.key}` {_described(value)} is none of its {len(target.names)} names"
            )
        return target.names.index(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < target.size:
        raise BadSample(
            f"target {name}: `{target.key}` must be a class number from 0 to {target.size - 1}, got {_described(value)}"
        )
    return value


def _described(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, (str, int, float)) else type(value).__name__
