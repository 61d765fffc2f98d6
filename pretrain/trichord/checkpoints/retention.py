"""Which checkpoints of a run are kept, and why; the others are removed. No torch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.manifest import TRAIN_STATE_FILE, incomplete_reason, read_json, step_folders
from trichord.core.errors import CheckpointError
from trichord.core.log import get_logger

log = get_logger(__name__)


def reasons_to_keep(scores: Mapping[int, float | None], config: CheckpointsConfig) -> dict[int, list[str]]:
    """Step -> why its checkpoint stays; steps without a reason are not in it.

    scores: step of each complete checkpoint -> its value of `keep_best.metric`, None where it has none. The newest
    always stays.
    """
    steps = sorted(scores)
    reasons: dict[int, list[str]] = {step: [] for step in steps}
    for step in steps[-config.keep_last :]:
        reasons[step].append(f"one of the last {config.keep_last}")
    every = config.keep_every_steps
    for step in steps:
        if every is not None and step % every == 0:
            reasons[step].append(f"every {every} steps")
    best = config.keep_best
    if best is not None:
        sign = 1.0 if best.mode == "min" else -1.0
        scored = [(sign * score, step) for step, score in scores.items() if score is not None]
        for place, (_, step) in enumerate(sorted(scored)[: best.count], start=1):  # of equal ones the older
            reasons[step].append(f"{best.metric} {scores[step]:.6g}, number {place} by {best.mode}")
    return {step: why for step, why in reasons.items() if why}


def score_of(train_state: Mapping[str, object], config: CheckpointsConfig) -> float | None:
    """The value of `keep_best.metric` that a checkpoint was saved with; None: it has none, or it is not finite."""
    metrics = train_state.get("metrics")
    if config.keep_best is None or not isinstance(metrics, Mapping):
        return None
    value = metrics.get(config.keep_best.metric)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def read_scores(folder: Path, config: CheckpointsConfig, known: dict[int, float | None]) -> dict[int, float | None]:
    """Scores of the complete checkpoints below `runs/NAME/checkpoints`. known: those of earlier calls, added to."""
    scores = {}
    for step, path in step_folders(folder).items():
        if incomplete_reason(path) is not None:
            continue
        if step not in known:
            known[step] = _read_score(lambda path=path: read_json(path / TRAIN_STATE_FILE), config)
        scores[step] = known[step]
    return scores


def _read_score(read: Callable[[], Mapping[str, object]], config: CheckpointsConfig) -> float | None:
    if config.keep_best is None:
        return None
    try:
        return score_of(read(), config)
    except CheckpointError:
        return None


class Retention:
    """Removes what has no reason to stay. Rank 0's; scores are read once."""

    def __init__(self, folder: Path, config: CheckpointsConfig):
        """folder: `runs/NAME/checkpoints`."""
        self.folder = Path(folder)
        self.config = config
        self._known: dict[int, float | None] = {}
        self._told = False

    def apply(self, saved: int, held: Collection[int] = ()) -> dict[int, list[str]]:
        """After the commit of step `saved`: remove, and return why the others stay. held: steps that stay for now.

        Folders that are not complete count for nothing: as long as they are the newest they stay, to be looked at.
        """
        self._known.pop(saved, None)  # an attempt that went back saves a step anew
        scores = read_scores(self.folder, self.config, self._known)
        kept = reasons_to_keep(scores, self.config)
        if not kept:  # nothing complete is there to go on from, so nothing is removed
            return kept
        oldest = min(sorted(scores)[-self.config.keep_last :])
        removed = []
        for step, path in step_folders(self.folder).items():
            if step not in kept and step not in held and (step in scores or step < oldest):
                remove_checkpoint(path)
                removed.append(path.name)
        if removed:
            log.info("removed %s; kept %s", ", ".join(removed), shown_reasons(kept))
        self._warn_without_scores(scores)
        return kept

    def _warn_without_scores(self, scores: Mapping[int, float | None]) -> None:
        best = self.config.keep_best
        if best is not None and not self._told and all(score is None for score in scores.values()):
            self._told = True
            log.warning(
                "checkpoints.keep_best: no checkpoint has a value of %r yet; names are those of metrics.jsonl, and a "
                "value must be there when the checkpoint is saved",
                best.metric,
            )


def remove_checkpoint(path: Path) -> None:
    """The name goes first: a half-removed folder must not look like a checkpoint."""
    doomed = path.with_name(f"{path.name}.partial-removed")
    shutil.rmtree(doomed, ignore_errors=True)  # of a removal that was cut short
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def shown_reasons(kept: Mapping[int, list[str]]) -> str:
    return "; ".join(f"step {step} ({', '.join(why)})" for step, why in sorted(kept.items()))


def why_kept(folder: Path) -> list[str] | None:
    """Why a checkpoint folder in its place is kept, by the config stored in it; empty: nothing says so, and the next
    save removes it. None: it cannot be told."""
    step = folder.name.removeprefix("step-")
    if not step.isdigit():
        return None
    try:
        stored = read_json(folder / TRAIN_STATE_FILE)["config"]["checkpoints"]
        config = CheckpointsConfig.model_validate(stored)
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
    scores = read_scores(folder.parent, config, {})
    return reasons_to_keep(scores, config).get(int(step), []) if int(step) in scores else None
