"""A plan as files: JSON for tools, and its best layout as YAML to be laid over the run's config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trichord.core.errors import ConfigError


def check_place(file: Path) -> None:
    """Whether `save_plan` could write there, before a plan is made.

    Raises:
        ConfigError: the file is no .json, or cannot be written.
    """
    if file.suffix != ".json":
        raise ConfigError(f"--save {file}: expected a name that ends in .json")
    for path in (file, file.with_suffix(".overlay.yaml")):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if path.is_dir() or (existing != path and not existing.is_dir()):
            raise ConfigError(
                f"--save {file}: cannot be written: {existing} is {'a' if path.is_dir() else 'no'} folder"
            )
        if not os.access(existing, os.W_OK):
            raise ConfigError(f"--save {file}: cannot be written: no permission for {existing}")


def save_plan(file: Path, facts: Mapping[str, Any]) -> list[Path]:
    """Write the plan as JSON, and beside it its best layout as FILE.overlay.yaml; returns both. Where nothing fits
    there is no overlay, and one of an earlier plan is removed.

    Raises:
        ConfigError: the file is no .json, or cannot be written.
    """
    check_place(file)
    written = {file: json.dumps(facts, indent=2) + "\n"}
    overlay = file.with_suffix(".overlay.yaml")
    if facts["overlay"] is not None:
        written[overlay] = overlay_text(facts)
    try:
        if overlay not in written:
            overlay.unlink(missing_ok=True)
        for path, text in written.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save {file}: cannot be written: {error.strerror}") from error
    return list(written)


def overlay_text(facts: Mapping[str, Any]) -> str:
    """The best layout as YAML to be laid over the run's config."""
    best, lines = facts["best"], []
    lines.append(f"# PREDICTION of `trichord plan` for run {facts['run']} on {facts['gpus']} {facts['gpu']['name']}:")
    lines.append(f"# {best['step_s']:.3g} s per step, {best['device_bytes'] / 2**30:.1f} GiB per GPU, not measured.")
    for section, values in facts["overlay"].items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {_yaml(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
