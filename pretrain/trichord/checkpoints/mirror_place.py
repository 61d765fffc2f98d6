"""Where the copies of a run go, and whether they can, asked before anything is trained."""

from __future__ import annotations

from pathlib import Path

from trichord.checkpoints.manifest import incomplete_reason, step_folders
from trichord.checkpoints.mirror_store import MirrorStore
from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.shards.locations import is_remote, local_path

log = get_logger(__name__)


def mirror_of(mirror: str, run_folder: Path) -> str:
    """The place of one run: `MIRROR/RUN`. Raises ConfigError: that is the run folder itself."""
    place = f"{mirror.rstrip('/')}/{Path(run_folder).name}"
    if not is_remote(place) and Path(local_path(place)).resolve() == Path(run_folder).resolve():
        raise ConfigError(f"checkpoints.mirror {mirror} is where the run itself lies ({place}); choose another place")
    return place


def require_place(mirror: str, run_folder: Path) -> None:
    """At the start of a run, on rank 0. A run with a checkpoint to go on from is only warned of a disk it cannot write.

    Raises:
        ConfigError: `checkpoints.mirror` is of no known kind, or a folder that cannot be written.
    """
    place = mirror_of(mirror, run_folder)
    try:
        MirrorStore(place).try_write()
    except ConfigError as error:
        raise ConfigError(f"checkpoints.mirror: {error}") from error
    except OSError as error:
        told = f"checkpoints.mirror {mirror} cannot be written: {error.strerror or error}"
        if not whole_steps(Path(run_folder) / "checkpoints"):
            raise ConfigError(f"{told}; choose another place, or set it to null for no copies") from error
        log.warning("%s: there are no copies until it can", told)


def whole_steps(checkpoints: Path) -> list[int]:
    return [step for step, path in step_folders(checkpoints).items() if incomplete_reason(path) is None]
