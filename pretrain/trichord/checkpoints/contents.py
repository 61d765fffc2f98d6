"""Checks of what a checkpoint holds: the index alone, the tensors against the index, both against the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trichord.checkpoints.finding import Finding, Verdict, earlier, some
from trichord.checkpoints.manifest import FORMAT, INDEX_FILE, read_json
from trichord.checkpoints.slices import slice_key
from trichord.checkpoints.state import WEIGHT
from trichord.core.errors import CheckpointError
from trichord.engine.ema import AVERAGE

_BLOCK = 2**24  # elements looked at at once


@dataclass(frozen=True)
class ExpectedModel:
    """The model of the checkpoint's config. shapes: of every parameter and stored buffer by name; room_of: name -> its
    room; tied: names that share one parameter, the stored one first."""

    shapes: Mapping[str, tuple[int, ...]]
    room_of: Callable[[str], str]
    tied: tuple[tuple[str, ...], ...] = ()


def read_index(folder: Path) -> dict[str, Any]:
    """The index, of the form that the other checks rely on. Raises CheckpointError."""
    index = read_json(folder / INDEX_FILE)
    try:
        if index["format"] != FORMAT:
            raise CheckpointError(f"index.json has format {index['format']!r}, this version reads {FORMAT}")
        for facts in index["params"].values():
            if not all(isinstance(size, int) and size >= 0 for size in facts["shape"]):
                raise TypeError(f"shape {facts['shape']!r}")
        for kinds in index["slices"].values():
            for pieces in kinds.values():
                for start, numel, file in pieces:
                    _ = int(start), int(numel), str(file)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"index.json is not of its form ({type(error).__name__}: {error})") from error
    return index


def check_coverage(index: dict[str, Any]) -> Finding:
    """Every element of every parameter and state once."""
    wrong = [f"{name} has no slices" for name in index["params"] if name not in index["slices"]]
    averaged = any(AVERAGE in kinds for kinds in index["slices"].values())
    for name, kinds in index["slices"].items():
        if name not in index["params"]:
            wrong.append(f"{name} has slices and no shape")
            continue
        numel = math.prod(index["params"][name]["shape"])
        if WEIGHT not in kinds and numel:
            wrong.append(f"{name} has no weights")
        if averaged and AVERAGE not in kinds and index["params"][name].get("group") is not None and numel:
            wrong.append(f"{name} has no average, others have")
        for kind, pieces in kinds.items():
            end = 0
            for start, count, _ in sorted(pieces):
                if start != end:
                    wrong.append(f"{kind} of {name} {'twice' if start < end else 'nowhere'} from {min(start, end)} on")
                    break
                end = start + count
            else:
                if end != numel:
                    wrong.append(f"{kind} of {name} has {end} of {numel} elements")
    states = Counter(tuple(sorted(set(kinds) - {WEIGHT})) for kinds in index["slices"].values())
    if wrong:
        return Finding("coverage", "fail", f"{len(wrong)} faults: {some(wrong)}", "resume from an earlier checkpoint")
    said = "; ".join(f"{count} with {', '.join(kinds) or 'no optimizer state'}" for kinds, count in states.items())
    return Finding("coverage", "pass", f"{len(index['params'])} parameters, every element once ({said})")


def check_slices(folder: Path, index: dict[str, Any]) -> Finding:
    """The files hold what the index promises."""
    promised: dict[str, dict[str, int]] = {}
    for name, kind, _, count, file in _pieces(index):
        promised.setdefault(file, {})[slice_key(name, kind)] = count
    wrong = []
    for file, slices in sorted(promised.items()):
        try:
            with safe_open(str(folder / file), framework="pt") as tensors:
                keys = set(tensors.keys())
                for key, count in slices.items():
                    shape = tensors.get_slice(key).get_shape() if key in keys else None
                    if shape is None or math.prod(shape) != count:
                        wrong.append(f"{key} in {file}: {count} elements promised, {shape or 'none'} there")
                wrong += [f"{key} in {file} is in no index" for key in sorted(keys - slices.keys())]
        except Exception as error:  # safetensors raises classes of its own for each kind of damage
            wrong.append(f"{file}: {type(error).__name__}: {error}")
    if wrong:
        return Finding("slices", "fail", f"{len(wrong)} faults: {some(wrong)}", earlier(folder))
    return Finding("slices", "pass", f"{sum(map(len, promised.values()))} slices in {len(promised)} files")


def check_keys(index: dict[str, Any], expected: ExpectedModel | str) -> list[Finding]:
    """Which parameters of each room of the model are there; what the model ties is stored once."""
    if isinstance(expected, str):
        return [Finding("keys", "skip", f"the model of its config cannot be built here: {expected}")]
    stored = {name: tuple(facts["shape"]) for name, facts in index["params"].items()}
    findings = []
    rooms = Counter(expected.room_of(name) for name in expected.shapes)
    for room, total in rooms.items():
        names = [name for name in expected.shapes if expected.room_of(name) == room]
        missing = [name for name in names if name not in stored]
        other = [
            f"{name} {stored[name]}, the model has {expected.shapes[name]}"
            for name in names
            if name in stored and stored[name] != expected.shapes[name]
        ]
        detail = f"{total - len(missing) - len(other)} of {total} parameters"
        detail += f"; missing: {some(missing)}" if missing else ""
        detail += f"; of another shape: {some(other)}" if other else ""
        verdict: Verdict = "fail" if missing or other else "pass"
        findings.append(Finding(f"keys of {room}", verdict, detail, "use the version that wrote it" if missing else ""))
    known = set(expected.shapes) | {name for names in expected.tied for name in names}
    extra = sorted(name for name in stored if name not in known)
    if extra:
        findings.append(Finding("keys", "fail", f"{len(extra)} the model has not: {some(extra)}", "is it this run's?"))
    return [*findings, *_tied(stored, expected)]


def _tied(stored: Mapping[str, tuple[int, ...]], expected: ExpectedModel) -> Iterator[Finding]:
    for names in expected.tied:
        there = [name for name in names if name in stored]
        if len(there) == 1:
            yield Finding("tied weights", "pass", f"{' = '.join(names)}, stored once as {there[0]}")
        elif there:
            detail = f"{' and '.join(there)} are one weight in the model and stored apart"
            yield Finding("tied weights", "fail", detail, "use the version that wrote it")


def check_values(folder: Path, index: dict[str, Any]) -> Finding:
    """No weight or state that is NaN or infinite, no negative second moment."""
    wrong: list[str] = []
    looked = 0
    for name, kind, _, count, file in _pieces(index):
        try:
            for block in _blocks(folder / file, slice_key(name, kind)):
                looked += block.numel()
                bad = int((~torch.isfinite(block)).sum())
                if bad:
                    wrong.append(f"{kind} of {name}: {bad} of {count} not finite")
                elif kind.endswith("_sq") and bool((block < 0).any()):
                    wrong.append(f"{kind} of {name}: below 0")
        except Exception as error:  # what cannot be read is told by the checks before
            wrong.append(f"{kind} of {name}: {type(error).__name__}")
    if wrong:
        return Finding("values", "fail", f"{len(wrong)} faults: {some(wrong)}", "resume from an earlier checkpoint")
    return Finding("values", "pass", f"{looked:,} numbers, all finite")


def _blocks(file: Path, key: str) -> Iterator[Tensor]:
    with safe_open(str(file), framework="pt") as tensors:
        whole = tensors.get_slice(key)
        (length,) = whole.get_shape()
        for start in range(0, length, _BLOCK):
            yield whole[start : start + _BLOCK]


def _pieces(index: dict[str, Any]) -> Iterator[tuple[str, str, int, int, str]]:
    """(name, kind, start, elements, file) of every slice; a file named with a path is not followed."""
    for name, kinds in index["slices"].items():
        for kind, pieces in kinds.items():
            for start, count, file in pieces:
                yield name, kind, int(start), int(count), Path(str(file)).name
