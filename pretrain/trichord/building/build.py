"""Rows for `trichord data build`, from a folder of files or from a table."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trichord.core.errors import DataError
from trichord.core.log import get_logger
from trichord.shards.config import FieldsConfig
from trichord.shards.members import is_unsafe, split_name
from trichord.building.writer import BuildRow, build_shards

__all__ = ["BuildRow", "build_shards", "rows_from_folder", "rows_from_table"]

_log = get_logger(__name__)
_FILE_COLUMNS = ("image", "audio")


def rows_from_folder(path: str | Path, fields: FieldsConfig | None = None) -> Iterator[BuildRow]:
    """Files that share a stem are one sample: `cat/1.jpg`, `cat/1.txt` -> key `cat/1`. Sorted by key, subfolders too.

    Files whose extension is not mapped to a field are left out and counted in the log.

    Raises:
        DataError: there is no such folder, or no file in it has a mapped extension.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"no folder {root}; give a folder of files, or a .csv or .jsonl table")
    fields = fields or FieldsConfig()
    mapped = {ext for kind in ("image", "audio", "text", "meta") for ext in getattr(fields, kind)}
    samples: dict[str, dict[str, bytes | Path]] = {}
    skipped = 0
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        parts = split_name(file.relative_to(root).as_posix())
        if parts is None or parts[1].lower() not in mapped:
            skipped += 1
            continue
        samples.setdefault(parts[0], {})[parts[1].lower()] = file
    if not samples:
        raise DataError(f"no file in {root} has a mapped extension ({', '.join(sorted(mapped))}); {skipped} others")
    if skipped:
        _log.warning("%d files in %s have no mapped extension and are left out", skipped, root)
    for key in sorted(samples):
        yield BuildRow(key, samples[key])


def rows_from_table(path: str | Path, fields: FieldsConfig | None = None) -> Iterator[BuildRow]:
    """One sample per row of a `.csv` (with a header line) or `.jsonl` table; the key is the row's number.

    Columns `image` and `audio` name files, relative to the table's folder or absolute; `text` is the text itself; an
    empty cell means that the sample has none. All other columns go into the `json` member.

    Raises:
        DataError: the table cannot be read, or a row is wrong; the message names line and column.
    """
    table = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if table.suffix not in readers:
        raise DataError(f"{table}: a table is a .csv or .jsonl file, got {table.suffix or 'no ending'!r}")
    if not table.is_file():
        raise DataError(f"no table {table}; check the path")
    fields = fields or FieldsConfig()
    try:
        for number, (line, row) in enumerate(readers[table.suffix](table)):
            yield BuildRow(f"{number:09d}", _members(table, line, row, fields))
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error


def _csv_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {*_FILE_COLUMNS, "text"} & set(reader.fieldnames or ()):
            raise DataError(
                f"{table}, line 1: expected a header with at least one of the columns image, audio, text; "
                f"got {', '.join(reader.fieldnames or ['nothing'])}"
            )
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{table}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells as in the header, "
                    "got another number; quote cells that hold commas"
                )
            yield reader.line_num, row


def _jsonl_rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with table.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(f"{table}, line {line}, column {error.colno}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise DataError(f"{table}, line {line}: expected a JSON object, got {type(row).__name__}")
            yield line, row


def _members(table: Path, line: int, row: dict[str, Any], fields: FieldsConfig) -> dict[str, bytes | Path]:
    members: dict[str, bytes | Path] = {}
    for column in (*_FILE_COLUMNS, "text"):
        cell = row.pop(column, None)
        if cell is None or cell == "":
            continue
        if not isinstance(cell, str):
            raise DataError(f"{table}, line {line}, column {column}: expected text, got {cell!r}")
        if column == "text":
            members[fields.text[0]] = cell.encode()
        else:
            file = _named_file(table, line, column, cell, fields)
            members[file.suffix[1:].lower()] = file
    if not members:
        raise DataError(f"{table}, line {line}: neither image nor audio nor text; fill one or delete the row")
    if row:
        members[fields.meta[0]] = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
    return members


def _named_file(table: Path, line: int, column: str, cell: str, fields: FieldsConfig) -> Path:
    file = table.parent / cell
    allowed = getattr(fields, column)
    if file.suffix[1:].lower() not in allowed or is_unsafe(file.suffix[1:]):
        raise DataError(
            f"{table}, line {line}, column {column}: {cell!r} ends in {file.suffix!r}; expected {', '.join(allowed)}"
        )
    if not file.is_file():
        raise DataError(f"{table}, line {line}, column {column}: no file {file}; paths are relative to the table")
    return file
