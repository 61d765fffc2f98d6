"""Logging: one logger per module under `trichord`, plain lines, the rank in front where there are several."""

import logging
import signal
import sys
from pathlib import Path
from typing import IO

from trichord.core.dist import rank_facts

DUMP_SIGNAL = signal.SIGUSR2
"""Has a data worker write its python stack to the log of its rank."""
FILE_ONLY = {"file_only": True}
"""`extra` of a message that stderr gets in other words."""


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; pass `__name__`."""
    return logging.getLogger(name)


class _ToStderr(logging.StreamHandler):
    """Writes to what `sys.stderr` is when something is logged: a progress bar puts its own in place for a while, and so
    do tests."""

    @property
    def stream(self):
        return sys.stderr

    @stream.setter
    def stream(self, value) -> None:
        pass


def log_stream() -> IO[str]:
    """Where python stacks go: this rank's log file, or stderr where it has none."""
    for handler in logging.getLogger("trichord").handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            return handler.stream
    return sys.__stderr__ or sys.stderr


class _ToFile(logging.FileHandler):
    """A log that cannot be written is told once on stderr and no reason to end the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's own name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self._told:
            self._told = True
            print(f"{self.baseFilename} cannot be written ({error.strerror}): lines are lost there", file=sys.stderr)

    _told = False


def quiet_libraries() -> None:
    """What libraries say to each other at import, and no user can act on, before torch is imported.

    torchao registers its enums with torch in a way that newer versions of torch warn of, once per enum and process.
    """
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def configure_logging(log_file: Path | None = None, level: int = logging.INFO) -> None:
    """Send `trichord` logs to stderr (rank 0: info, others: warnings) and, whole, to `log_file` when given.

    Idempotent: calling it again replaces the handlers, so a second run in one process does not log twice.
    """
    facts = rank_facts()
    prefix = f"[rank {facts.rank}] " if facts.world_size > 1 else ""
    formatter = logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    root = logging.getLogger("trichord")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    root.propagate = False
    stderr = _ToStderr()
    stderr.setLevel(level if facts.rank == 0 else logging.WARNING)
    stderr.addFilter(lambda record: not getattr(record, "file_only", False))
    handlers: list[logging.Handler] = [stderr]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(_ToFile(log_file))
    for handler in handlers:
        handler.setFormatter(formatter)
        root.addHandler(handler)
