"""The sorts of sources that `trichord data build` reads, which options each takes, and how a path tells its sort."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from trichord.building.places import refuse_remote_source
from trichord.building.rows import BadRow, BuildRow
from trichord.building.tabular import CHAT_KEYS, FIELD_COLUMNS, TableReading
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig

Rows = Iterator[BuildRow | BadRow]
_PEEKED_BYTES = 1 << 16
_MANY_FILES = 2000


@dataclass(frozen=True)
class ConvertOptions:
    """How a source is read; None or empty: as the kind does by default.

    media: folder that file names are relative to. column: field (image, audio, text, messages) -> column or key.
    captions: `all` or `first`. questions: `together` or `single`. annotations: file with the answers. instruction:
    added to the first question. documents: `file`, `line` or `block`. split: of a dataset on disk.
    """

    media: Path | None = None
    column: Mapping[str, str] = field(default_factory=dict)
    captions: str | None = None
    questions: str | None = None
    annotations: Path | None = None
    instruction: str | None = None
    documents: str | None = None
    split: str | None = None

    def given(self) -> dict[str, Any]:
        """The options that say something."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}


class Kind(NamedTuple):
    """rows: makes the rows of a source. takes: names of its options. is_: what it reads, in words."""

    rows: Callable[[Path, ConvertOptions, FieldsConfig, bool], Rows]
    takes: tuple[str, ...]
    is_: str


def source_rows(source: Path, kind: str, options: ConvertOptions, fields: FieldsConfig, shuffled: bool = False) -> Rows:
    """The rows of a source. shuffled: they will be read in another order.

    Raises:
        ConfigError: a URL, an option that the kind does not take, or a value it does not know.
    """
    refuse_remote_source(source)
    _check_options(kind, options)
    return KINDS[kind].rows(source, options, fields, shuffled)


def source_identity(source: Path, kind: str, options: ConvertOptions) -> dict[str, Any]:
    """What a build reads, as JSON: with the size and time of every file that lists samples."""
    files = [source] if source.is_file() else []
    if kind == "huggingface":
        from trichord.building.arrow import dataset_files

        files = dataset_files(source, options.split)
    given = options.given()
    given = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in given.items()}
    stamps = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    return {"kind": kind, "source": str(source.resolve()), "options": given, "files": stamps}


def guess_kind(source: Path) -> str:
    """The kind of a source where its path and first bytes leave no doubt.

    Raises:
        DataError: there is no such path. ConfigError: it may be several; the message lists the kinds.
    """
    refuse_remote_source(source)
    if not source.exists():
        raise DataError(f"no file or folder {source}; check the path")
    kind = _guess_folder(source) if source.is_dir() else _guess_file(source)
    if kind is None:
        raise ConfigError(
            f"{source} may be several things; say which: "
            + "; ".join(f"--from {name} ({kind.is_})" for name, kind in KINDS.items())
        )
    return kind


def _check_options(kind: str, options: ConvertOptions) -> None:
    if kind not in KINDS:
        raise ConfigError(f"no kind {kind!r} of source; expected {', '.join(KINDS)}")
    for name, value in options.given().items():
        if name not in KINDS[kind].takes:
            takes = ", ".join(f"--{option}" for option in KINDS[kind].takes) or "none of them"
            raise ConfigError(f"--{name} says nothing about {KINDS[kind].is_}; --from {kind} takes {takes}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"--{name} {value}: expected {', '.join(_CHOICES[name])}")
    refuse_remote_source(options.media, "--media")
    refuse_remote_source(options.annotations, "--annotations")
    unknown = [name for name in options.column if name not in FIELD_COLUMNS]
    if unknown:
        raise ConfigError(f"--column {unknown[0]}=...: expected one of {', '.join(FIELD_COLUMNS)} before the =")


def _guess_file(file: Path) -> str | None:
    name = file.name.lower()
    if name.endswith((".csv", ".parquet")):
        return "table"
    if name.endswith(".arrow"):
        return "huggingface"
    if name.endswith((".txt", ".txt.gz", ".md")):
        return "text"
    if not name.endswith((".json", ".jsonl", ".jsonl.gz")):
        return None
    from trichord.building.lines import open_bytes

    with open_bytes(file) as opened:
        start = opened.read(_PEEKED_BYTES).decode(errors="replace").lstrip("\ufeff \t\r\n")
    chat = any(f'"{key}"' in start for key in CHAT_KEYS)
    if not name.endswith(".json"):
        return "llava" if chat else "table"
    if start.startswith("["):
        return "llava" if chat else None
    return "vqa" if "questions" in name else "coco" if name.startswith("captions_") else None


def _guess_folder(folder: Path) -> str | None:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return "huggingface"
    endings: set[str] = set()
    nested = False
    for number, file in enumerate(folder.rglob("*")):
        if number > _MANY_FILES:
            break
        if file.is_file():
            endings.add(file.suffix.lower())
            nested = nested or file.parent != folder
            name = file.name.lower()
            if name.endswith(".json") and (name.startswith("captions_") or "openended" in name):
                return "coco" if name.startswith("captions_") else "vqa"
    media = {f".{ext}" for ext in (*FieldsConfig().image, *FieldsConfig().audio)}
    if endings & {".parquet", ".arrow"}:
        return "huggingface" if not endings & media else None
    if endings & media and endings & {".txt", ".json"}:
        return "folder"
    if endings & media:
        return None if nested else "folder"
    return "text" if endings & {".txt", ".jsonl", ".gz", ".md"} and ".json" not in endings else None


def _reading(source: Path, options: ConvertOptions, config: FieldsConfig, inline: bool = False) -> TableReading:
    root = options.media or (source if source.is_dir() else source.parent)
    return TableReading(root, options.column, config, inline)


def _folder(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.folder import rows_from_folder

    return rows_from_folder(source, config)


def _classes(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.folder import rows_from_classes

    return rows_from_classes(source, config)


def _table(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.table import rows_from_table

    return rows_from_table(source, _reading(source, options, config, shuffled))


def _chats(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.table import rows_from_chats

    return rows_from_chats(source, _reading(source, options, config))


def _coco(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.annotations import rows_from_coco

    return rows_from_coco(source, options.media, options.captions or "all", config)


def _vqa(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.annotations import SHORT_ANSWER, rows_from_vqa

    instruction = SHORT_ANSWER if options.instruction is None else options.instruction
    questions = options.questions or "together"
    return rows_from_vqa(source, options.annotations, options.media, questions, instruction, config)


def _text(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.corpus import rows_from_corpus

    return rows_from_corpus(source, options.documents or "file", _reading(source, options, config))


def _huggingface(source: Path, options: ConvertOptions, config: FieldsConfig, shuffled: bool) -> Rows:
    from trichord.building.arrow import dataset_files, rows_from_arrow

    return rows_from_arrow(dataset_files(source, options.split), _reading(source, options, config, shuffled))


_CHOICES = {
    "captions": ("all", "first"),
    "questions": ("together", "single"),
    "documents": ("file", "line", "block"),
}
KINDS: dict[str, Kind] = {
    "folder": Kind(_folder, (), "a folder whose files share a stem"),
    "table": Kind(_table, ("media", "column"), "a .csv, .jsonl or .parquet table"),
    "imagefolder": Kind(_classes, (), "one folder per class"),
    "llava": Kind(_chats, ("media", "column"), "conversations, a JSON list or .jsonl"),
    "coco": Kind(_coco, ("media", "captions"), "COCO captions"),
    "vqa": Kind(_vqa, ("media", "questions", "annotations", "instruction"), "VQA v2 questions"),
    "text": Kind(_text, ("column", "documents"), "plain text"),
    "huggingface": Kind(_huggingface, ("media", "column", "split"), "a Hugging Face dataset on disk"),
}
