"""`trichord quickstart`: real data -> shards -> train -> kill -> resume -> evaluate -> export -> caption -> report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from trichord.checkpoints.load import resolve_checkpoint
from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.selftest.processes import quiet_environment, train_and_kill, train_by_launcher, train_here

log = get_logger(__name__)
T = TypeVar("T")

CONFIG = "runs/quickstart.yaml"
SUITE = "suites/quickstart.yaml"
VOICES_SUITE = "suites/quickstart-voices.yaml"
COMPARED_STEPS = 20


@dataclass
class Quickstart:
    """One walk down the road.

    data: shards and tokenizer; runs: run folders. steps: length of training; None: the config's. The run is killed
    past a checkpoint in its second half. voices: add the speakers of quickstart/voices.py.
    """

    data: Path = Path("data/quickstart")
    runs: Path = Path("runs")
    steps: int | None = None
    voices: bool = False
    say: Callable[[str], None] = print
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.runs / "quickstart"

    def walk(self, prove: bool) -> dict[str, Any]:
        """All stages; returns what `result.json` holds.

        Raises:
            ConfigError: the run folder holds an earlier quick-start.
            TrichordError: a stage failed; the message has the end of its output.
        """
        if self.run.exists():
            raise ConfigError(f"{self.run} exists; remove it (rm -r {self.run}) to walk the road again")
        quiet_environment()
        _hide_progress_of_libraries()
        self.run.parent.mkdir(parents=True, exist_ok=True)
        self._stage("data", "real data from installed packages -> tar shards", self.build_data)
        total = self.steps or self._config_steps()
        every = max(1, total // 6)
        # Two processes are faster than one, so most steps are theirs; what is left is enough to compare losses.
        kill_after = every * max(1, min(4, (total - every - COMPARED_STEPS) // every))
        killed_at = self._stage(
            "train",
            f"2 processes, ZeRO-2; kill -9 one rank past step {kill_after} of {total}",
            lambda: self._train(total, every, kill_after),
        )
        proof: dict[str, Any] = {"digests": {}, "losses": {}}
        if prove:
            proof = self._stage("prove", "the same run undisturbed, and resumed", lambda: self._prove(total, every))
        self._stage("resume", f"1 process goes on from step {killed_at}", lambda: self._resume(total, every))
        metrics = self._stage("evaluate", "held-out scans, known recordings", self._evaluate)
        self._stage("export", "Hugging Face format", self._export)
        captions = self._stage("caption", "load the export, caption held-out scans", self._caption)
        result = {"metrics": metrics, **proof, "captions": captions, "seconds": self.seconds}
        if prove:
            result["losses"]["resumed_other_split"] = self._losses(self.run, killed_at)
            result["digests"]["resumed"] = self._digest(self.run)
            result["killed_at"] = killed_at
        (self.run / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        self._stage("report", "one HTML page", self._report)
        (self.run / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        return result

    def _stage(self, name: str, what: str, work: Callable[[], T]) -> T:
        started = time.monotonic()
        self.say(f"[{name}] {what} ...")
        result = work()
        self.seconds[name] = round(time.monotonic() - started, 2)
        self.say(f"[{name}] done in {self.seconds[name]:.1f} s")
        return result

    def build_data(self) -> dict[str, Any]:
        """The shards, alone: for the debug configs, which train on them."""
        from trichord.quickstart.dataset import build_quickstart_data
        from trichord.quickstart.voices import fetch_voices

        voices = fetch_voices(self.data.parent / "voices") if self.voices else []
        return build_quickstart_data(self.data, seed=0, voices=voices)

    def _config_steps(self) -> int:
        from trichord.config.load import load_run_config

        return load_run_config(CONFIG, []).run.max_steps or 0

    def _arguments(self, name: str, total: int, every: int) -> list[str]:
        return [
            CONFIG,
            f"run.name={name}",
            f"run.root={self.runs}",
            f"run.max_steps={total}",
            f"batches.tokenizer={self.data}/tokenizer",
            *(f"shards.sources.{i}.shards={self.data}/{s}-*.tar" for i, s in enumerate(TRAIN_SOURCES)),
            f"checkpoints.save_every_steps={every}",
            "tracking.log_every_steps=1",
        ]

    def _train(self, total: int, every: int, kill_after: int) -> int:
        arguments = self._arguments(self.run.name, total, every)
        return train_and_kill(arguments, 2, self.run, kill_after, self.runs / "quickstart.train.log")

    def _prove(self, total: int, every: int) -> dict[str, Any]:
        same = self.runs / "quickstart-same-split"
        undisturbed = self.runs / "quickstart-undisturbed"
        shutil.copytree(self.run, same, symlinks=True)  # a killed W&B leaves links to nothing
        killed_at = int(resolve_checkpoint(self.run).name.removeprefix("step-"))
        for folder in (same, undisturbed):
            arguments = self._arguments(folder.name, total, every)
            train_by_launcher(arguments, 2, self.runs / f"{folder.name}.log")
        return {
            "digests": {"undisturbed": self._digest(undisturbed), "resumed_same_split": self._digest(same)},
            "losses": {
                "undisturbed": self._losses(undisturbed, killed_at),
                "resumed_same_split": self._losses(same, killed_at),
            },
        }

    def _resume(self, total: int, every: int) -> None:
        # Another world size, another ZeRO stage, another number of micro-steps: the run does not notice.
        split = ["engine.zero_stage=0", "batches.micro_rows=8"]
        train_here([*self._arguments(self.run.name, total, every), *split], self.runs / "quickstart.resume.log")

    def _digest(self, folder: Path) -> str:
        manifest = resolve_checkpoint(folder) / "manifest.json"
        return json.loads(manifest.read_text())["data_digest"]

    def _losses(self, folder: Path, after_step: int) -> list[float]:
        from trichord.tracking.metrics import read_metrics

        rows = [row for row in read_metrics(folder) if row["step"] > after_step and "train/loss" in row]
        return [row["train/loss"] for row in rows[:COMPARED_STEPS]]

    def _evaluate(self) -> dict[str, Any]:
        from trichord.evaluate import evaluate
        from trichord.quickstart.baseline import pixel_baseline

        overrides = {source: f"{self.data}/{source}-*.tar" for source in EVALUATION_SOURCES}
        metrics = evaluate(self.run, VOICES_SUITE if self.voices else SUITE, shards=overrides)["metrics"]
        baseline = pixel_baseline(self.data)
        for name in SCAN_METRICS:
            metrics[name]["baseline"] = baseline
        return metrics

    def _export(self) -> None:
        from trichord.export import export

        export(self.run, self.run / "export")

    def _caption(self) -> list[dict[str, str]]:
        from trichord.quickstart.captions import caption_scans

        return caption_scans(self.run / "export", self.data, count=8)

    def _report(self) -> None:
        from trichord.tracking.report import render_report

        render_report([self.run], self.run / "report.html")


def _hide_progress_of_libraries() -> None:
    """transformers draws a bar for each file it writes or reads; here they are over in a moment."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


TRAIN_SOURCES = ("scans-train", "pairs-train", "speech-train")
EVALUATION_SOURCES = ("scans-heldout", "gallery", "speech-known", "voices-unseen")
SCAN_METRICS = ("retrieval/image-text/R@1 (scans-heldout)", "caption/image/exact_match (scans-heldout)")
