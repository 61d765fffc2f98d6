"""What is wrong with a checkpoint, without an engine, a GPU or a line of code out of the checkpoint.

Each check goes on where the one before it failed, as far as it can, so that one run tells everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trichord.batches.loader import LoaderState
from trichord.checkpoints.contents import (
    ExpectedModel,
    check_coverage,
    check_keys,
    check_slices,
    check_values,
    read_index,
)
from trichord.checkpoints.finding import Finding, Verdict, earlier, some
from trichord.checkpoints.hashes import hash_file
from trichord.checkpoints.manifest import (
    LOADER_FILE,
    MANIFEST_FILE,
    TRAIN_STATE_FILE,
    Manifest,
    incomplete_reason,
    read_json,
    step_folders,
)
from trichord.checkpoints.retention import why_kept
from trichord.core.errors import CheckpointError, TrichordError

TRAIN_STATE_KEYS = ("step", "optimizer_step", "config", "progress")
_CODE = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".pyd", ".py")
_HASH_NAMES = {"blake3": "BLAKE3", "blake2b": "BLAKE2b"}


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
        return [Finding("complete", "fail", str(incomplete_reason(folder)), earlier(folder))]
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
        index = read_index(folder)
    except CheckpointError as error:
        return [*findings, Finding("index", "fail", str(error), earlier(folder))]
    findings.append(check_coverage(index))
    findings.append(check_slices(folder, index))
    findings += check_keys(index, expected)
    findings.append(check_values(folder, index))
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
        return Finding("complete", "fail", f"{MANIFEST_FILE} is damaged: it names no files", earlier(folder))
    problem = incomplete_reason(folder)
    if problem is not None:
        return Finding("complete", "fail", problem, earlier(folder))
    listed = set(manifest.files)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in listed | {MANIFEST_FILE})
    if strange:
        return Finding("complete", "warn", f"not in the manifest: {some(strange)}", "remove what is not yours")
    return Finding("complete", "pass", f"{len(listed)} files of the sizes that the manifest names")


def _hashes(folder: Path, manifest: Manifest | None, on_progress: Callable[[], None]) -> Finding:
    if manifest is None:
        return Finding("hashes", "fail", "there is no manifest to compare with", earlier(folder))
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
        return Finding("hashes", "fail", f"the manifest cannot be used: {error}", earlier(folder))
    if wrong:
        return Finding("hashes", "fail", f"bytes have changed since the save: {some(wrong)}", earlier(folder))
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
        return Finding("no code", "warn", f"could hold code: {some(found)}", "nothing here reads them; remove them")
    return Finding("no code", "pass", "JSON and safetensors only; nothing was executed")


def _train_state(folder: Path, manifest: dict[str, Any]) -> Finding:
    try:
        state = read_json(folder / TRAIN_STATE_FILE)
    except CheckpointError as error:
        return Finding("training state", "fail", str(error), earlier(folder))
    missing = [key for key in TRAIN_STATE_KEYS if key not in state] if isinstance(state, dict) else ["all"]
    if missing:
        return Finding("training state", "fail", f"{TRAIN_STATE_FILE} lacks {some(missing)}", earlier(folder))
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
        return Finding("loader state", "fail", f"{type(error).__name__}: {error}", earlier(folder))
    if loader.step != manifest.get("step"):
        detail = f"it is of step {loader.step}, the manifest of {manifest.get('step')}"
        return Finding("loader state", "fail", detail, earlier(folder))
    stored = manifest.get("data_digest")
    if stored != digest:
        return Finding("loader state", "fail", f"data digest {digest}, the manifest says {stored}", earlier(folder))
    return Finding("loader state", "pass", f"{len(loader.lanes)} lanes after {loader.step} steps, digest {digest[:16]}")
