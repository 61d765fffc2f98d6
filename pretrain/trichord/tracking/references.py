"""Which artifacts a run has on Weights & Biases: its checkpoints and its exported models, where they lie. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.manifest import checkpoint_name
from trichord.checkpoints.retention import read_scores
from trichord.tracking.wandb_media import Reference


class References:
    """Of one run. run_facts: its resolved config as plain data."""

    def __init__(self, folder: Path, run_name: str, run_facts: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._name = re.sub(r"[^A-Za-z0-9_.-]", "-", run_name)
        self._config = CheckpointsConfig.model_validate(run_facts.get("checkpoints") or {})
        self._scores: dict[int, float | None] = {}

    def checkpoint(self, step: int, *, final: bool = False, mirrored: bool = False) -> Reference | None:
        """The checkpoint of a step, here or on the mirror; None: it is not there any more."""
        place = self._folder / "checkpoints" / checkpoint_name(step)
        if not place.is_dir():
            return None
        uri = place.resolve().as_uri()
        if mirrored and self._config.mirror is not None:
            uri = f"{self._config.mirror.rstrip('/')}/{self._folder.name}/{place.name}"
        aliases = ["latest", f"step-{step}", *(["best"] if self._is_best(step) else []), *(["final"] if final else [])]
        return Reference(f"{self._name}-checkpoint", "checkpoint", uri, tuple(aliases), {"step": step})

    def model(self, out: Path, step: int, ema: bool) -> Reference | None:
        """A model that was exported from the run; None: its folder is not there any more."""
        if not out.is_dir():
            return None
        aliases = ("latest", f"step-{step}", *(("ema",) if ema else ()))
        facts = {"step": step, "format": "transformers", "ema": ema}
        return Reference(f"{self._name}-model", "model", out.resolve().as_uri(), aliases, facts)

    def _is_best(self, step: int) -> bool:
        """By `checkpoints.keep_best`, of the checkpoints that are there."""
        best = self._config.keep_best
        if best is None:
            return False
        self._scores.pop(step, None)
        found = read_scores(self._folder / "checkpoints", self._config, self._scores)
        sign = 1.0 if best.mode == "min" else -1.0
        scored = [(sign * score, at) for at, score in found.items() if score is not None]
        return bool(scored) and min(scored)[1] == step
