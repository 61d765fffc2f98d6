"""Tables: `.csv` with a header line, `.jsonl`, `.parquet`; and conversations as LLaVA and ShareGPT publish them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trichord.building.columns import Origin, check_columns, tell_columns, watched
from trichord.building.lines import MAX_LINE_BYTES, json_elements, json_lines
from trichord.building.rows import BadRow, BuildRow
from trichord.building.tabular import CHAT_KEYS, FIELD_COLUMNS, TableReading, row_members
from trichord.core.errors import DataError
from trichord.shards.quarantine import BadSample

TABLE_ENDINGS = (".csv", ".jsonl", ".jsonl.gz", ".parquet")


def rows_from_table(path: Path, reading: TableReading) -> Iterator[BuildRow | BadRow]:
    """One sample per row; the key is the row's number.

    Columns `image` and `audio` name files, relative to `reading.root` or absolute (in parquet they may hold the bytes);
    `text` is the text itself; an empty cell means that the sample has none; `messages` is a chat. All other columns go
    into the `json` member.

    Raises:
        ConfigError: a column that was named is not there. DataError: the table cannot be read. A wrong row is a BadRow
            that names line and column.
    """
    if not path.name.endswith(TABLE_ENDINGS):
        raise DataError(f"{path}: a table ends in {', '.join(TABLE_ENDINGS)}; got {path.suffix or 'no ending'!r}")
    if not path.is_file():
        raise DataError(f"no table {path}; check the path")
    if path.suffix == ".parquet":
        from trichord.building.arrow import rows_from_arrow

        yield from rows_from_arrow([path], reading)
    else:
        lines = watched(json_lines(path), reading, str(path)) if path.suffix != ".csv" else _csv_rows(path, reading)
        yield from numbered(lines, reading)


def rows_from_chats(path: Path, reading: TableReading) -> Iterator[BuildRow | BadRow]:
    """One sample per conversation of a JSON list or of JSON lines, see `chats`; keys besides the chat stay in json."""
    if not path.is_file():
        raise DataError(f"no file {path}; expected a .json list or .jsonl of conversations")
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    rows = watched(json_lines(path) if lines else json_elements(path), reading, str(path))
    yield from numbered(_with_chat(rows, reading), reading)


def numbered(rows: Iterable[Origin], reading: TableReading) -> Iterator[BuildRow | BadRow]:
    """Samples of rows; a row's number is its key, also where rows before it are left out."""
    number = -1
    for number, (origin, row) in enumerate(rows):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield BuildRow(f"{number:09d}", row_members(row, reading), origin)
        except BadSample as error:
            yield BadRow(origin, str(error))


def _with_chat(rows: Iterable[Origin], reading: TableReading) -> Iterator[Origin]:
    for origin, row in rows:
        if isinstance(row, dict) and reading.column("messages", row) not in row:
            wanted = reading.columns.get("messages") or " or ".join(CHAT_KEYS)
            row = BadRow(origin, f"no {wanted}; got {', '.join(row) or 'nothing'}")
        yield origin, row


def _csv_rows(table: Path, reading: TableReading) -> Iterator[Origin]:
    csv.field_size_limit(MAX_LINE_BYTES)
    with table.open(newline="", encoding="utf-8-sig") as file, _said_of(table):
        reader = csv.DictReader(file)
        header = reader.fieldnames or ()
        if header:
            check_columns(reading, header, f"{table}, line 1")
        if not any(reading.column(name, header) in header for name in FIELD_COLUMNS):
            raise DataError(
                f"{table}, line 1: expected a header with at least one of the columns image, audio, text (or name "
                f"yours: --column text=caption); got {', '.join(header) or 'nothing'}"
            )
        tell_columns(reading, header, str(table))
        for row in reader:
            origin = f"{table}, line {reader.line_num}"
            if None in row or None in row.values():
                reason = (
                    f"expected {len(header)} cells as in the header, got another number; quote cells that hold commas"
                )
                yield origin, BadRow(origin, reason)
            else:
                yield origin, dict(row)


@contextmanager
def _said_of(table: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{table} is no csv: {error}; quote cells that hold quotes or line breaks") from error
