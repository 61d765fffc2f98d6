"""Finding a checkpoint and filling an engine from it, whatever world size and ZeRO stage wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trichord.batches.loader import LoaderState
from trichord.checkpoints.manifest import (
    LOADER_FILE,
    MANIFEST_FILE,
    TRAIN_STATE_FILE,
    checkpoint_name,
    incomplete_reason,
    read_verified_json,
    step_folders,
)
from trichord.checkpoints.slices import SliceReader
from trichord.checkpoints.state import (
    WEIGHT,
    create_optimizer_state,
    named_buffers,
    named_parameters,
    pack_optimizer_state,
    parameter_shape,
    refresh_parameters,
    slices_to_fill,
)
from trichord.core.errors import CheckpointError
from trichord.core.log import get_logger
from trichord.engine.ema import AVERAGE

log = get_logger(__name__)

RESUME_KEYS = ("step", "optimizer_step", "progress")


@dataclass(frozen=True)
class LoadedState:
    """What a checkpoint says besides tensors: `step` steps were done; train_state as given to the saver."""

    folder: Path
    step: int
    train_state: dict[str, Any]
    loader: LoaderState


def find_latest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `runs/NAME/checkpoints`, or None.

    `latest` is only a hint for humans: what counts is the manifest, and that its files are there in full size.
    """
    for path in _newest_first(folder):
        problem = incomplete_reason(path)
        if problem is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, problem)
    return None


def find_resumable(folder: Path) -> Path | None:
    """As `find_latest`, for a run that is to go on: None only where there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, none complete. Starting again would overwrite what may be mended.
    """
    latest, there = find_latest(folder), _newest_first(folder)
    if latest is None and there:
        raise CheckpointError(
            f"{there[0]}: {incomplete_reason(there[0])}; none of the {len(there)} checkpoints there is complete, so "
            f"the run cannot go on. Copy a whole one back, or remove {Path(folder).parent} to start again from step 0, "
            "or choose another run.name"
        )
    return latest


def _newest_first(folder: Path) -> list[Path]:
    return list(reversed(step_folders(folder).values()))


def find_step(folder: Path, step: int) -> Path:
    """The checkpoint of one step.

    Raises:
        CheckpointError: it is not there, or not complete; lists the steps that are.
    """
    path = Path(folder) / checkpoint_name(step)
    problem = incomplete_reason(path)
    if problem is None:
        return path
    there = sorted(p.name for p in Path(folder).glob("step-*") if incomplete_reason(p) is None)
    raise CheckpointError(f"{path}: {problem}; complete checkpoints there: {', '.join(there) or 'none'}")


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from what a user names: the folder itself, a run folder, or its `checkpoints` folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).exists():
        problem = incomplete_reason(path)
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}")
        return path
    for folder in (path, path / "checkpoints"):
        latest = find_latest(folder) if folder.is_dir() else None
        if latest is not None:
            return latest
    raise CheckpointError(f"{path} is no checkpoint and no run folder with one: expected {path}/checkpoints/step-*/")


def read_train_state(folder: Path, needs: Sequence[str] = RESUME_KEYS) -> dict[str, Any]:
    """The JSON part of a checkpoint: step, counters, optimizer groups, seed, the resolved config.

    Raises:
        CheckpointError: damaged, or without one of the keys that the caller `needs`.
    """
    state = read_verified_json(folder, TRAIN_STATE_FILE)
    missing = [key for key in needs if key not in state]
    if missing:
        raise CheckpointError(
            f"{Path(folder) / TRAIN_STATE_FILE} lacks {', '.join(missing)}: it is damaged or of another "
            f"version; remove {folder} to go on from the checkpoint before it"
        )
    return state


def read_facts(folder: Path) -> LoadedState:
    """Everything of a checkpoint but its tensors. Raises CheckpointError: it is damaged."""
    state = read_train_state(folder)
    content = read_verified_json(folder, LOADER_FILE)
    try:
        return LoadedState(folder, int(state["step"]), state, LoaderState.from_json(content))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{Path(folder) / LOADER_FILE} is not of its form ({type(error).__name__}: {error}): it is damaged or of "
            f"another version; remove {folder} to go on from the checkpoint before it"
        ) from error


def load_into(engine: Any, folder: Path) -> LoadedState:
    """Fill masters and optimizer states of `engine`, then refresh the parameters. All ranks call it together.

    Raises:
        CheckpointError: the checkpoint belongs to another model, or is damaged.
    """
    reader = SliceReader(folder)
    facts = read_facts(folder)
    shapes = {name: parameter_shape(p) for name, p in named_parameters(engine)}
    buffers = {name: tuple(buffer.shape) for name, buffer in named_buffers(engine).items()}
    check_shapes(folder, reader.shapes, shapes, buffers)
    if facts.train_state["optimizer_step"] > 0:
        create_optimizer_state(engine, reader.index["slices"], facts.train_state["optimizer_step"])
    averaged = AVERAGE in reader.kinds()
    for piece in slices_to_fill(engine):
        if piece.name in buffers and piece.name not in reader.shapes:
            continue
        for kind, live in piece.tensors.items():
            stored = WEIGHT if kind == AVERAGE and not averaged else kind  # an average starts from the weights
            live.copy_(reader.read(piece.name, stored, piece.start, piece.numel))
    pack_optimizer_state(engine)
    refresh_parameters(engine)
    _tell_average(folder, averaged, engine.weight_average is not None)
    return facts


def _tell_average(folder: Path, stored: bool, wanted: bool) -> None:
    """What becomes of the average of weights, where the run and the checkpoint differ about it."""
    if wanted and not stored:
        log.info("%s has no average of weights: engine.ema_decay starts one from its weights", folder)
    elif stored and not wanted:
        log.info("%s has an average of weights, which ends here: engine.ema_decay is not set", folder)


def load_weights(folder: Path, ema: bool = False) -> dict[str, Tensor]:
    """All parameters whole, fp32, on the CPU: for evaluation, export and new runs.

    ema: the average of those that learn instead; frozen ones have none.

    Raises:
        CheckpointError: damaged; or an average is asked for, and the run made none.
    """
    reader = SliceReader(folder)
    if not ema:
        return {name: reader.read_full(name) for name in reader.shapes}
    if AVERAGE not in reader.kinds():
        raise CheckpointError(
            f"{folder} has no average of weights: its run had no engine.ema_decay; leave --ema out to take the weights"
        )
    frozen = {name for name, facts in reader.index["params"].items() if facts["group"] is None}
    return {name: reader.read_full(name, WEIGHT if name in frozen else AVERAGE) for name in reader.shapes}


def check_shapes(
    folder: Path,
    stored: dict[str, tuple[int, ...]],
    model: dict[str, tuple[int, ...]],
    buffers: dict[str, tuple[int, ...]],
) -> None:
    """Raise unless both have the same parameters, and buffers as far as they are stored: once none was.

    Raises:
        CheckpointError: naming up to three of each kind of difference.
    """
    absent = sorted(buffers.keys() - stored.keys())
    if absent:
        log.warning(
            "%s holds no %s%s: made before running statistics were stored; they start anew",
            *(folder, absent[0], f" and {len(absent) - 1} more buffers" if len(absent) > 1 else ""),
        )
    model = {**model, **{name: shape for name, shape in buffers.items() if name in stored}}
    missing = sorted(set(model) - set(stored))
    extra = sorted(set(stored) - set(model))
    other = [
        f"{n} {stored[n]} there, {model[n]} here" for n in sorted(set(model) & set(stored)) if stored[n] != model[n]
    ]
    if not (missing or extra or other):
        return
    parts = []
    for what, names in (("not in the checkpoint", missing), ("not in the model", extra), ("of another shape", other)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {what} ({'; '.join(names[:3])}{more})")
    raise CheckpointError(
        f"{folder} belongs to another model: parameters {', '.join(parts)}. "
        "Resume with the config it was made with, or start a new run with run.init_from"
    )
