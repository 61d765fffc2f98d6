"""Errors a user can act on. Each carries the exit code of the process that dies of it.

A message says what was expected, what came, and what to do. Anything that is not a `TrichordError` is a bug and
keeps its traceback.
"""

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_STOPPED = 75  # stopped on a signal with a checkpoint: requeue me (BSD's EX_TEMPFAIL)


class TrichordError(Exception):
    """Base of all errors that end in one message and no traceback."""

    exit_code = EXIT_UNEXPECTED


class ConfigError(TrichordError):
    """Usage or configuration is wrong; nothing was started."""

    exit_code = EXIT_CONFIG


class DataError(TrichordError):
    """The data cannot be read, or too much of it is bad."""

    exit_code = EXIT_DATA


class StoppedError(TrichordError):
    """A signal came before the first step: no checkpoint is needed, and the next start goes on from what is made."""

    exit_code = EXIT_STOPPED


class CheckpointError(TrichordError):
    """A checkpoint is missing, incomplete, or does not belong to this config."""

    exit_code = EXIT_CHECKPOINT
