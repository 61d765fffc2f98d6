"""Folders that the run will write into."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from trichord.config.identity import run_path
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.shards.cache import cache_root
from trichord.shards.locations import is_compressed, is_remote
from trichord.shards.storage import configure_storage
from trichord_launch.preflight.finding import Finding, of_error


def check_folders(config: RunConfig) -> list[Finding]:
    """The run folder; and the cache, where shards are not read from where they are."""
    try:
        found = [_check("run folder", run_path(config).absolute(), "choose a folder you may write to as run.root")]
    except ConfigError as error:
        return [of_error("run folder", error, "choose another run.root")]
    if any(is_remote(shard) or is_compressed(shard) for source in config.shards.sources for shard in source.shards):
        configure_storage(config.shards.storage)
        found.append(_check("cache", Path(cache_root()), "set shards.storage.cache_dir, or TRICHORD_CACHE"))
    return found


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def _check(name: str, path: Path, remedy: str) -> Finding:
    place = existing(path)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".preflight-") as probe:
            (Path(probe) / "probe").write_text("written\n")
    except OSError as error:
        detail = f"{path} cannot be written: {error.strerror} in {place}"
        return Finding(name, "fail", detail, f"{remedy}, or have {place} opened to you", "config")
    return Finding(name, "pass", f"{path} can be written")
