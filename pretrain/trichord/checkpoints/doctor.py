"""What is wrong with a checkpoint, without an engine, a GPU or a line of code out of the checkpoint.

Each check goes on where the one before it failed, as far as it can, so that one run tells everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from trichord.batches.loader import LoaderState
from trichord.checkpoints.hashes import hash_file
from trichord.checkpoints.manifest import (
    FORMAT,
    INDEX_FILE,
    LOADER_FILE,
    MANIFEST_FILE,
    TRAIN_STATE_FILE,
    Manifest,
    incomplete_reason,
    read_json,
    step_folders,
)
from trichord.checkpoints.retention import why_kept
from trichord.checkpoints.slices import slice_key
from trichord.checkpoints.state import WEIGHT
from trichord.core.errors import CheckpointError, TrichordError
from trichord.engine.ema import AVERAGE

Verdict = Literal["pass", "warn", "fail", "skip"]
TRAIN_STATE_KEYS = ("step", "optimizer_step", "config", "progress")
_CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".pyd", ".py")
_HASH_NAMES = {"blake3": "BLAKE3", "blake2b": "BLAKE2b"}
_NAMED = 3
_BLOCK = 2**24  # elements looked at at once


@dataclass(frozen=True)
class Finding:
    """The result of one check: `detail` is what was found, `remedy` what to do about it."""

    check: str
    verdict: Verdict
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class ExpectedModel:
    """The model of the checkpoint's config. shapes: of every parameter and stored buffer by name; room_of: name -> its
    room; tied: names that share one parameter, the stored one first."""

    shapes: Mapping[str, tuple[int, ...]]
    room_of: Callable[[str], str]
    tied: tuple[tuple[str, ...], ...] = ()


def examine(
    folder: Path,
    expected: ExpectedModel | str,
    on_progress: Callable[[], None] = lambda: None,
) -> list[Finding]:
    """All findings about one checkpoint folder; reads every byte of it twice and writes nothing.

    Args:
        expected: the model that the checkpoint's config builds, or why there is none.
        on_progress: called for each file of the manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return [Finding("complete", "fail", str(incomplete_reason(folder)), _earlier(folder))]
    manifest = _read_manifest(folder)
    findings = [
        _complete(folder, manifest),
        _hashes(folder, manifest, on_progress),
        _no_code(folder),
        *_kept(folder),
        _train_state(folder, manifest.content if manifest else {}),
        _loader_state(folder, manifest.content if manifest else {}),
    ]
    try:
        index = _read_index(folder)
    except CheckpointError as error:
        return [*findings, Finding("index", "fail", str(error), _earlier(folder))]
    findings.append(_coverage(index))
    findings.append(_slices_on_disk(folder, index))
    findings += _keys(index, expected)
    findings.append(_values(folder, index))
    return findings


def find_patient(path: Path) -> Path:
    """The checkpoint folder that is meant, whole or not: itself, or the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).exists() or path.name.startswith("step-"):
        if not path.is_dir():
            raise CheckpointError(f"{path} is no folder")
        return path
    for folder in (path, path / "checkpoints"):
        if steps := step_folders(folder):
            return steps[max(steps)]
    raise CheckpointError(f"{path} is no checkpoint and no run folder with one: expected {path}/checkpoints/step-*/")


def worst(findings: list[Finding]) -> Verdict:
    """The verdict on the whole: the worst of all findings; what was skipped is no fault."""
    found = {finding.verdict for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "pass"


def _read_manifest(folder: Path) -> Manifest | None:
    """None where it names no files."""
    try:
        return Manifest(folder)
    except CheckpointError:
        return None


def _complete(folder: Path, manifest: Manifest | None) -> Finding:
    if manifest is None:
        return Finding("complete", "fail", f"{MANIFEST_FILE} is damaged: it names no files", _earlier(folder))
    problem = incomplete_reason(folder)
    if problem is not None:
        return Finding("complete", "fail", problem, _earlier(folder))
    listed = set(manifest.files)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in listed | {MANIFEST_FILE})
    if strange:
        return Finding("complete", "warn", f"not in the manifest: {_some(strange)}", "remove what is not yours")
    return Finding("complete", "pass", f"{len(listed)} files of the sizes that the manifest names")


def _hashes(folder: Path, manifest: Manifest | None, on_progress: Callable[[], None]) -> Finding:
    if manifest is None:
        return Finding("hashes", "fail", "there is no manifest to compare with", _earlier(folder))
    wrong, kinds = [], set()
    try:
        for name in manifest.files:
            kind, expected = manifest.hash(name)
            kinds.add(_HASH_NAMES[kind])
            path = folder / name
            if path.is_file() and hash_file(path, kind) != expected:
                wrong.append(name)
            on_progress()
    except (CheckpointError, OSError) as error:
        return Finding("hashes", "fail", f"the manifest cannot be used: {error}", _earlier(folder))
    if wrong:
        return Finding("hashes", "fail", f"bytes have changed since the save: {_some(wrong)}", _earlier(folder))
    said = " and ".join(sorted(kinds))
    return Finding("hashes", "pass", f"{len(manifest.files)} files have the {said} hashes of the manifest")


def _kept(folder: Path) -> Iterator[Finding]:
    """Why it has not been removed, or that it will be."""
    why = why_kept(folder)
    if why:
        yield Finding("kept", "pass", "; ".join(why))
    elif why is not None:
        yield Finding("kept", "pass", "no reason any more: the next save of the run removes it")


def _no_code(folder: Path) -> Finding:
    found = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _CODE)
    if found:
        return Finding("no code", "warn", f"could hold code: {_some(found)}", "nothing here reads them; remove them")
    return Finding("no code", "pass", "JSON and safetensors only; nothing was executed")


def _train_state(folder: Path, manifest: dict[str, Any]) -> Finding:
    try:
        state = read_json(folder / TRAIN_STATE_FILE)
    except CheckpointError as error:
        return Finding("training state", "fail", str(error), _earlier(folder))
    missing = [key for key in TRAIN_STATE_KEYS if key not in state] if isinstance(state, dict) else ["all"]
    if missing:
        return Finding("training state", "fail", f"{TRAIN_STATE_FILE} lacks {_some(missing)}", _earlier(folder))
    steps = {TRAIN_STATE_FILE: state["step"]}
    if manifest:
        steps[MANIFEST_FILE] = manifest.get("step")
    if folder.name.removeprefix("step-").isdigit():
        steps["the folder's name"] = int(folder.name.removeprefix("step-"))
    if len(set(map(str, steps.values()))) > 1:
        said = ", ".join(f"{where} says {step}" for where, step in steps.items())
        return Finding("training state", "fail", f"the step is not one: {said}", "give the folder its own name back")
    return Finding("training state", "pass", f"step {state['step']}, {state['optimizer_step']} optimizer updates")


def _loader_state(folder: Path, manifest: dict[str, Any]) -> Finding:
    try:
        loader = LoaderState.from_json(read_json(folder / LOADER_FILE))
        digest = loader.digest()
    except (TrichordError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Finding("loader state", "fail", f"{type(error).__name__}: {error}", _earlier(folder))
    if loader.step != manifest.get("step"):
        detail = f"it is of step {loader.step}, the manifest of {manifest.get('step')}"
        return Finding("loader state", "fail", detail, _earlier(folder))
    stored = manifest.get("data_digest")
    if stored != digest:
        return Finding("loader state", "fail", f"data digest {digest}, the manifest says {stored}", _earlier(folder))
    return Finding("loader state", "pass", f"{len(loader.lanes)} lanes after {loader.step} steps, digest {digest[:16]}")


def _read_index(folder: Path) -> dict[str, Any]:
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


def _coverage(index: dict[str, Any]) -> Finding:
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
        return Finding("coverage", "fail", f"{len(wrong)} faults: {_some(wrong)}", "resume from an earlier checkpoint")
    said = "; ".join(f"{count} with {', '.join(kinds) or 'no optimizer state'}" for kinds, count in states.items())
    return Finding("coverage", "pass", f"{len(index['params'])} parameters, every element once ({said})")


def _slices_on_disk(folder: Path, index: dict[str, Any]) -> Finding:
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
        return Finding("slices", "fail", f"{len(wrong)} faults: {_some(wrong)}", _earlier(folder))
    return Finding("slices", "pass", f"{sum(map(len, promised.values()))} slices in {len(promised)} files")


def _keys(index: dict[str, Any], expected: ExpectedModel | str) -> list[Finding]:
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
        detail += f"; missing: {_some(missing)}" if missing else ""
        detail += f"; of another shape: {_some(other)}" if other else ""
        verdict: Verdict = "fail" if missing or other else "pass"
        findings.append(Finding(f"keys of {room}", verdict, detail, "use the version that wrote it" if missing else ""))
    known = set(expected.shapes) | {name for names in expected.tied for name in names}
    extra = sorted(name for name in stored if name not in known)
    if extra:
        findings.append(Finding("keys", "fail", f"{len(extra)} the model has not: {_some(extra)}", "is it this run's?"))
    return [*findings, *_tied(stored, expected)]


def _tied(stored: Mapping[str, tuple[int, ...]], expected: ExpectedModel) -> Iterator[Finding]:
    for names in expected.tied:
        there = [name for name in names if name in stored]
        if len(there) == 1:
            yield Finding("tied weights", "pass", f"{' = '.join(names)}, stored once as {there[0]}")
        elif there:
            detail = f"{' and '.join(there)} are one weight in the model and stored apart"
            yield Finding("tied weights", "fail", detail, "use the version that wrote it")


def _values(folder: Path, index: dict[str, Any]) -> Finding:
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
        return Finding("values", "fail", f"{len(wrong)} faults: {_some(wrong)}", "resume from an earlier checkpoint")
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


def _earlier(folder: Path) -> str:
    """What to do about a damaged checkpoint: what else is there."""
    beside = step_folders(folder.parent).values()
    others = [path.name for path in beside if path.name != folder.name and incomplete_reason(path) is None]
    there = f"go on from {others[-1]} (remove or move this folder)" if others else "there is no other one beside it"
    return f"copy a whole one back, or {there}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
