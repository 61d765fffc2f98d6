"""JSON files that a command line names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError


def read_json_option(option: str, path: Path, remedy: str) -> Any:
    """What the file of an option such as `--plan` holds. remedy: how to make one, the end of each message.

    Raises:
        ConfigError: there is none, it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{option} {path}: no such file; {remedy}") from error
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read: {error.strerror}; {remedy}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ConfigError(f"{option} {path}: not JSON; {remedy}") from error
