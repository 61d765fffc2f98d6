"""Tokenizer, backbones and first weights: all of them must lie on this machine before a job starts."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trichord.config.run import RunConfig
from trichord_launch.preflight.finding import Finding

Needs = Literal["tokenizer", "model", "weights"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Reference:
    """What a key of the config names: a path, or `hub-id@revision`. needs: which files of it are read."""

    key: str
    name: str
    needs: Needs

    @property
    def is_hub(self) -> bool:
        local = self.name.startswith((".", "/", "~")) or Path(self.name).expanduser().exists()
        return not local and self.name.count("/") == 1 and self.needs != "weights"

    @property
    def repo(self) -> str:
        return self.name.partition("@")[0]

    @property
    def revision(self) -> str:
        return self.name.partition("@")[2] or "main"


def references(config: RunConfig) -> list[Reference]:
    """All that the config names, in the order of its rooms."""
    found = [Reference("batches.tokenizer", config.batches.tokenizer, "tokenizer")]
    vision, audio, trunk = config.encoders.vision, config.encoders.audio, config.fusion.trunk
    for key, leaf in (("encoders.vision.weights", vision), ("encoders.audio.weights", audio)):
        if leaf is not None and leaf.weights is not None:
            found.append(Reference(key, leaf.weights, "weights"))
    if trunk is not None and trunk.weights is not None:
        found.append(Reference("fusion.trunk.weights", trunk.weights, "model"))
    if config.run.init_from is not None:  # `...#vision,audio`: only these rooms
        found.append(Reference("run.init_from", config.run.init_from.partition("#")[0], "model"))
    return found


def check_models(config: RunConfig, config_name: str) -> list[Finding]:
    """A finding for each reference."""
    return [check_reference(reference, config_name) for reference in references(config)]


def check_reference(reference: Reference, config_name: str) -> Finding:
    """Whether everything that is read of it is here. config_name: as the user named the config."""
    place = local_folder(reference)
    if place is None and reference.is_hub:
        said = f"{reference.repo}@{reference.revision} is not in the hub's cache ({hub_cache()})"
        return _fail(reference, said, f"trichord-launch preflight {config_name} --fetch, where there is internet")
    if place is None:
        said = f"expected a folder or hub-id@revision, nothing is at {reference.name!r}"
        return _fail(reference, said, "correct the path, or copy it there")
    if missing := missing_files(reference, place):
        again = f"trichord-launch preflight {config_name} --fetch" if reference.is_hub else "copy it again"
        return _fail(reference, f"{place} lacks {', '.join(missing)}", again)
    if not reference.is_hub:
        return Finding(reference.key, "pass", f"{place} is there")
    if not _COMMIT.fullmatch(reference.revision):
        said = f"{reference.repo}@{reference.revision} is in the cache, now commit {place.name}"
        remedy = f"pin it: {reference.key}={reference.repo}@{place.name}"
        return Finding(reference.key, "warn", f"{said}; a branch may move between two starts", remedy, "config")
    return Finding(reference.key, "pass", f"{reference.repo} at commit {place.name[:12]} is in the cache")


def local_folder(reference: Reference) -> Path | None:
    """The file or folder itself, or the snapshot in the hub's cache; None: it is not here."""
    if not reference.is_hub:
        path = Path(reference.name).expanduser()
        return path if path.exists() else None
    repo = hub_cache() / f"models--{reference.repo.replace('/', '--')}"
    commit = reference.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (repo / "refs" / commit).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    folder = repo / "snapshots" / commit
    return folder if folder.is_dir() else None


def missing_files(reference: Reference, place: Path) -> list[str]:
    """Names of files that would be read and are not there; links into nowhere count as missing."""
    if reference.needs == "tokenizer":
        return [] if (place / "tokenizer.json").is_file() else ["tokenizer.json"]
    if place.is_file():
        return []
    if reference.key == "run.init_from" and not (place / "config.json").is_file():
        # A run folder or one of its checkpoints, which hold their own manifest.
        own = [*place.glob("manifest.json"), *place.glob("checkpoints/*/manifest.json"), *place.glob("*/manifest.json")]
        return [] if own else ["config.json"]
    missing = [] if reference.needs == "weights" or (place / "config.json").is_file() else ["config.json"]
    return [*missing, *_missing_weights(place)]


def hub_cache(environ: Mapping[str, str] | None = None) -> Path:
    """Where huggingface_hub keeps what it fetched."""
    environ = os.environ if environ is None else environ
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _missing_weights(place: Path) -> list[str]:
    if (place / "model.safetensors").is_file():
        return []
    if (place / _INDEX).is_file():
        try:
            names = json.loads((place / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            return sorted({Path(name).name for name in names if not (place / Path(name).name).is_file()})
        except (ValueError, LookupError, TypeError, AttributeError):
            return [f"a readable {_INDEX}"]
    if any(place.glob("*-of-*.safetensors")):
        return [_INDEX]
    return [] if any(path.is_file() for path in place.glob("*.safetensors")) else ["model.safetensors"]


def _fail(reference: Reference, detail: str, remedy: str) -> Finding:
    return Finding(reference.key, "fail", detail, remedy, "config")
