"""What a run leaves behind while it runs: metrics, events, progress, the W&B mirror. Only rank 0 records."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trichord.core.errors import EXIT_UNEXPECTED, TrichordError
from trichord.core.log import get_logger
from trichord.tracking.config import TrackingConfig
from trichord.tracking.metrics import EventsWriter, MetricsWriter
from trichord.tracking.progress import Progress
from trichord.tracking.references import References
from trichord.tracking.tensorboard import TensorBoardMirror
from trichord.tracking.wandb import WandbMirror

log = get_logger(__name__)

_ALERT_WAIT_S = 20.0  # torchrun gives a process 30 s


@dataclass
class Window:
    """Sums since the last log line: host numbers only, so that collecting them costs nothing."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, float]) -> None:
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self.started)


class Recorder:
    """The record of one attempt. Other ranks get one that ignores everything (`active=False`)."""

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        active: bool,
        attempt: int,
        resume_step: int | None,
        total_steps: int,
        run_name: str,
        run_facts: Mapping[str, Any],
        wandb_run_id: str | None,
    ):
        self.active = active
        self.newest: dict[str, float] = {}
        self._folder = folder
        self.wandb_run_id = wandb_run_id
        if not active:
            return
        self._name = run_name
        self._references = References(folder, run_name, run_facts)
        self._metrics = MetricsWriter(folder, resume_step=resume_step)
        self._events = EventsWriter(folder, attempt=attempt)
        self._progress = Progress(total_steps, first_step=resume_step or 0, label=run_name)
        self._tensorboard = TensorBoardMirror(folder, resume_step=resume_step) if config.tensorboard else None
        self._wandb = WandbMirror(
            config.wandb,
            folder,
            run_name=run_name,
            run_config=run_facts,
            run_id=wandb_run_id,
            resume_step=resume_step,
            attempt=attempt,
        )
        self.wandb_run_id = self._wandb.run_id

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """One line of metrics at `step`, to the JSONL first, then to the mirror and the progress display."""
        if not self.active:
            return
        self.newest.update(values)
        with self._readable_failure():
            self._metrics.log(step, values)
        self._wandb.log(step, values)
        if self._tensorboard is not None:
            self._tensorboard.log(step, values)
        if "train/loss" in values:  # of an evaluation there is nothing to show beside the step
            self._progress.update(step, values)

    def advance(self, step: int) -> None:
        """`step` steps are done: moves a progress bar, writes nothing."""
        if self.active:
            self._progress.advance(step)

    def event(self, kind: str, step: int | None = None, **facts: Any) -> None:
        if self.active:
            with self._readable_failure():
                self._events.log(kind, step=step, **facts)
            self._mirror_event(kind, step, facts)

    def previews(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Lines that were written to `previews.jsonl`."""
        if self.active and lines:
            self._wandb.table(step, lines)

    def failed(self, reason: str) -> None:
        """The run ends without having been told to; never raises. The process may leave at once, so W&B is closed here,
        which waits a bounded time for the alert to be sent."""
        if self.active:
            self._wandb.alert(f"{self._name} failed", reason, "ERROR")
            self._wandb.finish(EXIT_UNEXPECTED, wait_s=_ALERT_WAIT_S)

    def _mirror_event(self, kind: str, step: int | None, facts: Mapping[str, Any]) -> None:
        """To W&B: checkpoints as artifacts, and an alert where the run stops before its end."""
        if step is not None and kind == "checkpoint":
            self._wandb.reference(self._references.checkpoint(step))
        elif step is not None and kind == "mirror" and facts.get("ok"):
            self._wandb.reference(self._references.checkpoint(step, mirrored=True))
        elif step is not None and kind == "end":
            if facts.get("checkpoint_saved"):
                self._wandb.reference(self._references.checkpoint(step, final=bool(facts.get("finished"))))
            else:  # the run fails for it once everything is closed
                why = f"the last checkpoint (step {step}) could not be written"
                self._wandb.alert(f"{self._name} failed", why, "ERROR")
            if not facts.get("finished"):
                why = f"stopped at step {step} by {facts.get('signal') or 'a signal'}"
                self._wandb.alert(f"{self._name} stopped", why, "WARN")

    @contextmanager
    def _readable_failure(self) -> Iterator[None]:
        """A disk that is full or gone ends the run: without its record it could not be resumed or judged."""
        try:
            yield
        except OSError as error:
            raise TrichordError(
                f"the record of the run in {self._folder} cannot be written: {error.strerror or error}; "
                "free space there, then run the same command to go on from the last checkpoint"
            ) from error

    def close(self, exit_code: int) -> None:
        """Flush and close everything; never raises."""
        if not self.active:
            return
        for name, close in (
            ("progress", self._progress.close),
            ("tensorboard", self._tensorboard.close if self._tensorboard is not None else lambda: None),
            ("wandb", lambda: self._wandb.finish(exit_code)),
            ("metrics", self._metrics.close),
            ("events", self._events.close),
        ):
            try:
                close()
            except Exception as error:  # the run is over: a failing sink must not change its outcome
                log.warning("closing %s failed: %s", name, error)
