"""Folders of files: files that share a stem, and one folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trichord.building.media import json_bytes
from trichord.building.rows import BadRow, BuildRow
from trichord.core.errors import ConfigError, DataError
from trichord.core.log import get_logger
from trichord.core.words import some
from trichord.shards.config import FieldsConfig
from trichord.shards.members import split_name

_log = get_logger(__name__)
_MAX_NAMED = 5
_MEDIA = {
    "image": {"gif", "bmp", "tif", "tiff", "heic", "heif", "avif", "jp2", "jxl", "ppm", "ico", "tga"},
    "audio": {"m4a", "aac", "wma", "aif", "aiff", "amr", "au", "caf", "mp2", "oga"},
}
"""Endings of formats that are none of the usual fields: a sample that lost its image must not pass for a text."""
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def rows_from_folder(root: Path, fields: FieldsConfig) -> Iterator[BuildRow | BadRow]:
    """Files that share a stem are one sample: `cat/1.jpg`, `cat/1.txt` -> key `cat/1`. Sorted by key, subfolders too.

    Dots in a stem become underscores: a key in a tar ends at the first dot. Members of a chat that was unpacked
    (`a.json` with `a.0.jpg`) stay with it. Files whose extension is not mapped to a field are left out and named in the
    log, but for images and clips: where their sample has no other, they are bad.

    Raises:
        DataError: there is no such folder, no file in it has a mapped extension, or two stems make one key.
    """
    mapped = {ext for kind in ("image", "audio", "text", "meta") for ext in getattr(fields, kind)}
    samples: dict[str, dict[str, Path]] = {}
    stems: dict[str, str] = {}
    others: list[Path] = []
    for file, key, ext, stem in _placed(root, _files(root), mapped, fields):
        if ext not in mapped and not _is_item(ext):
            others.append(file)
            continue
        if stems.setdefault(key, stem) != stem:
            raise DataError(f"{stems[key]} and {stem} in {root} both make the key {key!r}; rename one of them")
        samples.setdefault(key, {})[ext] = file
    renamed = [f"{stem} -> {key}" for key, stem in stems.items() if key != stem]
    if renamed:
        _log.warning("dots in names become underscores, as keys hold none: %s", some(renamed, _MAX_NAMED))
    bad = _unread(others, samples, fields, root)
    _say_skipped(root, [file for file in others if file not in bad], len(samples) + len(bad), mapped)
    for file, (key, reason) in bad.items():
        samples.pop(key, None)
        yield BadRow(str(file), reason)
    for key in sorted(samples):
        yield BuildRow(key, samples[key])


def _placed(
    root: Path, files: list[Path], mapped: set[str], fields: FieldsConfig
) -> Iterator[tuple[Path, str, str, str]]:
    """(file, key, extension, stem) of each file; the extension is all behind the first dot where that is mapped."""
    names = {file: file.relative_to(root).as_posix() for file in files}
    chats = {split[0] for name in names.values() if (split := split_name(name)) and split[1].lower() in fields.meta}
    for file, name in names.items():
        if file.name.startswith("."):  # `._1.jpg` of a Mac is no picture
            yield file, name, "", name
            continue
        key, ext = split_name(name) or (name, "")
        if ext.lower() in mapped or (key in chats and _is_item(ext.lower())):
            yield file, key, ext.lower(), key
        else:
            stem, ext = name.removesuffix(file.suffix), file.suffix[1:].lower()
            folder, _, base = stem.rpartition("/")
            yield file, f"{folder}/{base.replace('.', '_')}".lstrip("/"), ext, stem


def _is_item(ext: str) -> bool:
    """Whether an extension is that of an image or clip of a chat: `0.jpg`."""
    return ext.split(".")[0].isdigit() and ext.count(".") == 1


def _unread(
    others: list[Path], samples: dict[str, dict[str, Path]], fields: FieldsConfig, root: Path
) -> dict[Path, tuple[str, str]]:
    """Images and clips in formats that are not mapped, with key and reason; not where the sample has another one."""
    bad = {}
    for file in others:
        kind = _kind(file)
        key = _key(file, root)
        if (
            kind
            and not file.name.startswith(".")
            and not any(ext in getattr(fields, kind) for ext in samples.get(key, ()))
        ):
            bad[file] = (key, _unmapped(file, kind, fields))
    return bad


def _key(file: Path, root: Path) -> str:
    path = file.relative_to(root)
    return path.with_name(path.stem.replace(".", "_")).as_posix()


def _kind(file: Path) -> str | None:
    return next((kind for kind, endings in _MEDIA.items() if file.suffix[1:].lower() in endings), None)


def _unmapped(file: Path, kind: str, fields: FieldsConfig) -> str:
    what = {"image": "an image", "audio": "a clip"}[kind]
    formats = ", ".join(getattr(fields, kind))
    return f"{what} in none of the mapped formats ({formats}): {file.suffix}; convert it, or move it away"


def rows_from_classes(root: Path, fields: FieldsConfig) -> Iterator[BuildRow | BadRow]:
    """`ROOT/heron/any/where/1.jpg` -> the image, and json with `class` "heron", `label` 3, `file`.

    Labels number the sorted classes.

    The key is the file's number in the sorted list; images and clips in formats that are not mapped are bad.

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
    read = [file for file in files if file.suffix[1:].lower() in mapped]
    found = [file for file in files if file.parent != root and (file.suffix[1:].lower() in mapped or _kind(file))]
    _say_skipped(root, sorted({*files} - {*found}), len(read), mapped)
    for number, file in enumerate(found):
        kind = _kind(file)
        if kind and file.suffix[1:].lower() not in mapped:
            yield BadRow(str(file), _unmapped(file, kind, fields))
            continue
        path = file.relative_to(root)
        facts = {"class": path.parts[0], "label": labels[path.parts[0]], "file": path.as_posix()}
        yield BuildRow(f"{number:09d}", {file.suffix[1:].lower(): file, fields.meta[0]: json_bytes(facts)}, str(file))


def _files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"no folder {root}; check the path")
    files, links = [], []
    for path in sorted(root.rglob("*")):
        if path.is_file():
            files.append(path)
        elif path.is_symlink():
            links.append(path.relative_to(root).as_posix())
    if links:
        _log.warning(
            "%d links in %s lead to no file and are left out (links to folders are not followed): %s",
            len(links),
            root,
            some(links, _MAX_NAMED),
        )
    return files


def _say_skipped(root: Path, skipped: list[Path], samples: int, mapped: set[str]) -> None:
    named = some([file.relative_to(root).as_posix() for file in skipped], _MAX_NAMED)
    if not samples:
        there = f"; there are {named}" if skipped else "; it is empty"
        raise DataError(f"no file in {root} has a mapped extension ({', '.join(sorted(mapped))}){there}")
    if skipped:
        _log.warning("%d files in %s have no mapped extension and are left out: %s", len(skipped), root, named)
