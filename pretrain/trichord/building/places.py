"""Where a build may read and write: on this machine's disks, or what is mounted there."""

from __future__ import annotations

import re
from pathlib import Path

from trichord.core.errors import ConfigError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
"""A Path has lost one of the slashes. One letter is no scheme."""


def refuse_address(place: str | Path | None, option: str, advice: str) -> None:
    """Raise ConfigError where a place is a URL: as a path it would be a folder `s3:` here.

    Args:
        option: what the place was given as (`--out`). advice: what to do; ADDRESS in it stands for the URL.
    """
    match = _ADDRESS.match(str(place)) if place is not None else None
    if match is None:
        return
    address = f"{match[1]}://{str(place)[match.end() :]}"
    if match[1] == "file":
        raise ConfigError(f"{option} {address}: expected a path of this machine; leave out file://")
    raise ConfigError(
        f"{option} {address} is an address; expected a path of this machine: {advice.replace('ADDRESS', address)}"
    )


def refuse_remote_out(out: str | Path) -> None:
    """Raise ConfigError where a folder for shards is a URL: their names must appear at once, which no bucket can do."""
    refuse_address(
        out,
        "--out",
        "build into a folder and copy it: aws s3 sync FOLDER ADDRESS (or gsutil, rclone, fsspec); training then reads "
        "the shards where they are",
    )


def refuse_remote_source(source: str | Path | None, option: str = "SOURCE") -> None:
    """Raise ConfigError where a source is a URL."""
    refuse_address(source, option, "download it first, with the files that it names, with your own tools")
