"""Tables: `.csv` with a header line, `.jsonl`, `.parquet`; and conversations as LLaVA and ShareGPT publish them."""

from __future__ import annotations

import csv
import io
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
        records = _csv_records(file, table)
        _, header = next(records, (1, []))
        if isinstance(header, BadRow):
            raise DataError(f"{header.origin}: {header.reason}")
        if header:
            check_columns(reading, header, f"{table}, line 1")
        if not any(reading.column(name, header) in header for name in FIELD_COLUMNS):
            raise DataError(
                f"{table}, line 1: expected a header with at least one of the columns image, audio, text (or name "
                f"yours: --column text=caption); got {', '.join(header) or 'nothing'}"
            )
        tell_columns(reading, header, str(table))
        for line, cells in records:
            origin = f"{table}, line {line}"
            if isinstance(cells, BadRow):
                yield origin, cells
            elif len(cells) != len(header):
                reason = (
                    f"expected {len(header)} cells as in the header, got another number; quote cells that hold commas"
                )
                yield origin, BadRow(origin, reason)
            else:
                yield origin, dict(zip(header, cells))


def _csv_records(file: Iterable[str], table: Path) -> Iterator[tuple[int, list[str] | BadRow]]:
    """(number of its last line, cells) of every row that is not blank.

    Strict: a quote that is not closed would else take what follows, up to the next quote or the end, for one cell.

    Raises:
        DataError: quotes are wrong over several lines, so that no one can say where the next row begins.
    """
    lines: list[str] = []  # of one row
    reader = csv.reader(_kept(file, lines), strict=True)
    while True:
        first = reader.line_num + 1
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            origin, last = f"{table}, line {first}", reader.line_num
            if str(error) == _UNCLOSED:
                opened = _opening_line(lines, last)
                raise DataError(f"{table}, line {opened}: a quote opens here and is never closed; {_QUOTES}") from error
            if last > first:
                raise DataError(f"{origin}: no csv from here to line {last} ({error}); {_QUOTES}") from error
            yield last, BadRow(origin, f"no csv ({error}); {_QUOTES}")
            continue
        if cells:
            yield reader.line_num, cells


_UNCLOSED = "unexpected end of data"
"""Of csv.reader, where the file ends in quotes."""
_QUOTES = 'quote cells that hold quotes or line breaks, and write a quote in them twice ("")'


def _kept(file: Iterable[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _opening_line(lines: list[str], last: int) -> int:
    """In which line the quote opened that is open at the end of `lines`, of which line `last` of the file is the last.

    What it took is the last cell of the row as a reader that is not strict sees it.
    """
    taken = next(csv.reader(lines))[-1]
    return last + 1 - max(1, sum(1 for _ in io.StringIO(taken, newline="")))


@contextmanager
def _said_of(table: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8") from error
