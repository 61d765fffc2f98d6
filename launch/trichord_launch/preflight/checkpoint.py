"""Does the config fit the run that stands in its folder, and is there a checkpoint to go on from?

World size and ZeRO stage do not matter: any number of ranks reads a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trichord.checkpoints.manifest import (
    FORMAT,
    INDEX_FILE,
    LOADER_FILE,
    MANIFEST_FILE,
    TRAIN_STATE_FILE,
    checkpoint_name,
    incomplete_reason,
    read_json,
    step_folders,
)
from trichord.config.identity import RunFolder, compare_for_resume, inspect_run_folder
from trichord.config.run import RunConfig
from trichord.core.errors import CheckpointError, TrichordError
from trichord_launch.preflight.finding import Finding, of_error

_OWN = "put the run's own values back, or choose another run.name"


def check_checkpoint(config: RunConfig) -> list[Finding]:
    """What the run would go on from, and whether it may."""
    try:
        folder = inspect_run_folder(config)
        if folder.kind == "fresh":
            mirror = config.checkpoints.mirror
            asked = f"; the mirror {mirror} is asked when it starts" if mirror else ""
            return [Finding("checkpoint", "pass", f"none in {folder.path}: a new run{asked}")]
        return _go_on(config, folder)
    except TrichordError as error:
        return [of_error("checkpoint", error, _OWN)]


def _go_on(config: RunConfig, folder: RunFolder) -> list[Finding]:
    findings: list[Finding] = []
    if folder.kind == "branch":
        assert folder.branch_folder is not None
        assert folder.branch_step is not None
        chosen = folder.branch_folder / "checkpoints" / checkpoint_name(folder.branch_step)
        if problem := incomplete_reason(chosen):
            return [_fail(f"{chosen}: {problem}", "branch from a step that is there: RUN@STEP in run.resume")]
    else:
        steps = list(step_folders(folder.path / "checkpoints").values())
        broken = {path: problem for path in steps if (problem := incomplete_reason(path)) is not None}
        whole = [path for path in steps if path not in broken]
        if not whole:
            said = f"{steps[-1]}: {broken[steps[-1]]}; none of {len(steps)} checkpoints is complete"
            return [_fail(said, "copy a whole one back, or choose another run.name to start again")]
        chosen = whole[-1]
        if steps[-1] in broken:
            said = f"{steps[-1].name} is not complete ({broken[steps[-1]]}); {chosen.name} would be gone on from"
            findings.append(Finding("checkpoint", "warn", said, f"trichord doctor {folder.path}", "checkpoint"))
    findings.append(_fits(config, chosen, branch=folder.kind == "branch"))
    return findings


def _fits(config: RunConfig, chosen: Path, branch: bool) -> Finding:
    """The checkpoint's own config and formats against what is to run."""
    state, index = read_json(chosen / TRAIN_STATE_FILE), read_json(chosen / INDEX_FILE)
    if index.get("format") != FORMAT or not index.get("params"):
        said = f"{chosen} has checkpoint format {index.get('format')!r}, this version reads {FORMAT}"
        return _fail(said, "use the version of trichord that wrote it, or choose another run.name")
    missing = [name for name in (LOADER_FILE, TRAIN_STATE_FILE) if name not in _files(chosen)]
    if missing:
        return _fail(f"{chosen} lacks {' and '.join(missing)}", "copy a whole one back, or go on from an earlier one")
    compare_for_resume(_config_of(chosen, state), config, branch)
    step, steps = int(state["step"]), config.run.max_steps
    ranks = sum(name.endswith(".safetensors") for name in _files(chosen))
    if steps is not None and step >= steps and not branch:
        said = f"the run is at step {step} of {steps}: there is nothing to do"
        return Finding("checkpoint", "warn", said, "raise run.max_steps to go on", "checkpoint")
    return Finding("checkpoint", "pass", f"goes on from {chosen.name}, written by {ranks} ranks; any number reads it")


def _config_of(chosen: Path, state: dict[str, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(state["config"])
    except (ValidationError, KeyError) as error:
        said = str(error).splitlines()[0]
        raise CheckpointError(
            f"the config in {chosen / TRAIN_STATE_FILE} does not load with this version ({said}); use the version of "
            "trichord that wrote it, or choose another run.name"
        ) from error


def _files(chosen: Path) -> dict[str, Any]:
    return read_json(chosen / MANIFEST_FILE)["files"]


def _fail(detail: str, remedy: str) -> Finding:
    return Finding("checkpoint", "fail", detail, remedy, "checkpoint")
