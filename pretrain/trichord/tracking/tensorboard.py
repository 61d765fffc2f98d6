"""TensorBoard as a second sink: event files in the run folder. `metrics.jsonl` stays the record.

Every start of a run writes one more file. It begins with a mark by which TensorBoard hides what earlier files hold of
steps that are done again (`purge_step`).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError
from trichord.core.log import get_logger

FOLDER = "tensorboard"
_WRITERS = ("torch.utils.tensorboard", "tensorboardX")
_logger = get_logger(__name__)


class TensorBoardMirror:
    """Copies metrics to event files. A failure warns once and switches the mirror off; only a missing package raises.

    folder: the run folder; files go to `tensorboard/` in it. resume_step: the step of the checkpoint that the run goes
    on from; None: it begins.

    Raises:
        ConfigError: neither `tensorboard` nor `tensorboardX` is installed.
    """

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        make_writer = _find_writer()
        self._writer: Any = None
        try:
            self._writer = make_writer(log_dir=str(Path(folder) / FOLDER), purge_step=(resume_step or 0) + 1)
        except Exception as error:  # a disk at fault is no reason to stop training
            self._give_up("could not start", error)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Mirror one line of the record; non-finite values, for which the charts have no place, are left out."""
        if self._writer is None:
            return
        try:
            for name, value in metrics.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)
            self._writer.flush()  # a killed process loses nothing
        except Exception as error:
            self._give_up("could not log", error)

    def close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _give_up(self, what: str, error: Exception) -> None:
        self._writer = None
        _logger.warning(
            "tensorboard %s (%s: %s); going on without it, metrics.jsonl has everything",
            *(what, type(error).__name__, error),
        )


def _find_writer() -> Any:
    """The SummaryWriter class of whichever package is installed."""
    for module in _WRITERS:
        try:
            return importlib.import_module(module).SummaryWriter
        except ImportError:
            continue
    raise ConfigError(
        "tracking.tensorboard is true, but neither tensorboard nor tensorboardX is installed; "
        "`pip install tensorboard`, or set tracking.tensorboard to false"
    )
