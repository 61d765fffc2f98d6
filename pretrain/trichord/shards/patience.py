"""How the process reads storage: its StorageConfig, and trying again."""

import random
import time
from collections.abc import Callable
from typing import TypeVar

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.config import StorageConfig

_log = get_logger(__name__)
Result = TypeVar("Result")

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
# What waiting does not mend.
_FINAL_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_jitter = random.SystemRandom()  # forked workers must not wait the same times, and no one's seed is touched
_settings = StorageConfig()


def settings() -> StorageConfig:
    """The StorageConfig of this process."""
    return _settings


def set_settings(config: StorageConfig) -> None:
    """Patience and cache of this process and of what it forks from now on."""
    global _settings
    _settings = config


def with_retries(action: Callable[[], Result], what: str) -> Result:
    """Run `action`; on an I/O error try again, `storage.attempts` times in all.

    Between two tries it waits 0.2 s, then twice as long each time (30 s at most), times a random 0.5 to 1.5: a storage
    that is down is not met by all workers at once when it comes back.

    Raises:
        DataError: it failed every time, or in a way that waiting does not mend. `what` says what was being done.
    """
    attempts, delay_s = _settings.attempts, FIRST_DELAY_S
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except _FINAL_ERRORS as error:
            raise DataError(f"{what}: {error}; check that the shard is there and readable") from error
        except OSError as error:
            if attempt == attempts:
                raise DataError(
                    f"{what}: failed {attempts} times, last with {type(error).__name__}: {error}; "
                    "check the storage, then start again"
                ) from error
            wait_s = delay_s * _jitter.uniform(0.5, 1.5)
            _log.warning("%s: %s; try %d of %d follows in %.1f s", what, error, attempt + 1, attempts, wait_s)
            time.sleep(wait_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)
    raise AssertionError("unreachable")
