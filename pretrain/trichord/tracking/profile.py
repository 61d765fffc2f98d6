"""A window of steps under torch's profiler: one trace per rank, for Perfetto or chrome://tracing."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from trichord.core.log import get_logger
from trichord.tracking.config import ProfileConfig

_logger = get_logger(__name__)


class StepProfiler:
    """Profiles the steps after `config.start_step`, `config.steps` of them; before and after it does nothing.

    folder: where `step-000100-attempt-1-rank-00000.json.gz` goes. A trace that cannot be written is told and left out.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, *, rank: int, attempt: int) -> None:
        self._window = range(config.start_step, config.start_step + config.steps) if config else range(0)
        self._folder, self._rank, self._attempt = Path(folder), rank, attempt
        self._profiler: Any = None
        self._first = self._now = 0
        self._step = contextlib.ExitStack()

    def begin(self, step: int) -> Path | None:
        """A step begins after `step` finished ones. Returns the trace that was written, where the window has ended."""
        self._step.close()
        self._now = step
        written = None
        if self._profiler is not None and step not in self._window:
            written = self._write()
        if step in self._window:
            self._enter(step)
        return written

    def close(self) -> Path | None:
        """The run ends; a window that is still open ends with it. Returns the trace, if one was written."""
        self._step.close()
        if self._window and self._now < self._window.start:
            _logger.warning("no trace: tracking.profile.start_step is %d, and no step began there", self._window.start)
        return self._write() if self._profiler is not None else None

    def _enter(self, step: int) -> None:
        from torch import cuda, profiler

        if self._profiler is None:
            activities = [profiler.ProfilerActivity.CPU]
            activities += [profiler.ProfilerActivity.CUDA] if cuda.is_available() else []
            self._first = step
            self._profiler = profiler.profile(activities=activities)
            self._profiler.start()
        self._step.enter_context(profiler.record_function(f"step {step + 1}"))

    def _write(self) -> Path | None:
        profiler, self._profiler = self._profiler, None
        self._window = range(0)
        begun = time.monotonic()
        path = self._folder / f"step-{self._first:06d}-attempt-{self._attempt}-rank-{self._rank:05d}.json.gz"
        try:
            profiler.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _logger.warning("the trace %s could not be written: %s", path, error)
            return None
        _logger.info("trace of the steps after %d: %s, in %.1f s", self._first, path, time.monotonic() - begun)
        return path
