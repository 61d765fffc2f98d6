"""Folders of files: files that share a stem, and one folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trichord.building.media import json_bytes
from trichord.building.rows import BadRow, BuildRow
from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.shards.config import FieldsConfig
from trichord.shards.members import split_name

_log = get_logger(__name__)
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def rows_from_folder(root: Path, fields: FieldsConfig) -> Iterator[BuildRow]:
    """Files that share a stem are one sample: `cat/1.jpg`, `cat/1.txt` -> key `cat/1`. Sorted by key, subfolders too.

    Files whose extension is not mapped to a field are left out and counted in the log.

    Raises:
        DataError: there is no such folder, or no file in it has a mapped extension.
    """
    mapped = {ext for kind in ("image", "audio", "text", "meta") for ext in getattr(fields, kind)}
    samples: dict[str, dict[str, Path]] = {}
    skipped = 0
    for file in _files(root):
        parts = split_name(file.relative_to(root).as_posix())
        if parts is None or parts[1].lower() not in mapped:
            skipped += 1
            continue
        samples.setdefault(parts[0], {})[parts[1].lower()] = file
    _say_skipped(root, skipped, len(samples), mapped)
    for key in sorted(samples):
        yield BuildRow(key, samples[key])


def rows_from_classes(root: Path, fields: FieldsConfig) -> Iterator[BuildRow | BadRow]:
    """`ROOT/heron/any/where/1.jpg` -> the image, and json with `class` "heron", `label` 3, `file`.

    Labels number the sorted classes.

    The key is the file's number in the sorted list.

    Raises:
        ConfigError: the folders are those of splits. DataError: there is no class folder, or no image or clip in it.
    """
    files = _files(root)
    classes = sorted({file.relative_to(root).parts[0] for file in files if file.parent != root})
    if not classes:
        raise DataError(
            f"{root} has no class folders: expected {root}/CLASS/FILE.jpg; see --from folder for other folders"
        )
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise ConfigError(
            f"{root} holds {', '.join(classes)}, which are no classes; name one of them: {root / classes[0]}"
        )
    mapped = {*fields.image, *fields.audio}
    labels = {name: number for number, name in enumerate(classes)}
    found = [file for file in files if file.parent != root and file.suffix[1:].lower() in mapped]
    _say_skipped(root, len(files) - len(found), len(found), mapped)
    for number, file in enumerate(found):
        path = file.relative_to(root)
        facts = {"class": path.parts[0], "label": labels[path.parts[0]], "file": path.as_posix()}
        yield BuildRow(f"{number:09d}", {file.suffix[1:].lower(): file, fields.meta[0]: json_bytes(facts)}, str(file))


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"no folder {root}; check the path")
    return sorted(file for file in root.rglob("*") if file.is_file())


def _say_skipped(root: Path, skipped: int, samples: int, mapped: set[str]) -> None:
    if not samples:
        raise DataError(f"no file in {root} has a mapped extension ({', '.join(sorted(mapped))}); {skipped} others")
    if skipped:
        _log.warning("%d files in %s have no mapped extension and are left out", skipped, root)
