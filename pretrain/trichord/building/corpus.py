"""Plain text: a document per file, per line, or per block between blank lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trichord.building.columns import watched
from trichord.building.lines import MAX_LINE_BYTES, open_bytes, read_lines
from trichord.building.media import text_bytes
from trichord.building.rows import BadRow, BuildRow
from trichord.building.table import numbered
from trichord.building.tabular import TableReading
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig
from trichord.shards.quarantine import BadSample

TEXT_ENDINGS = (".txt", ".text", ".md", ".txt.gz")
JSON_ENDINGS = (".jsonl", ".jsonl.gz")
Document = tuple[str, "str | BadRow"]


def rows_from_corpus(source: Path, documents: str, reading: TableReading) -> Iterator[BuildRow | BadRow]:
    """One sample per document that is not blank; the key is its number.

    Args:
        source: a file, or a folder whose text files are read in the order of their paths. documents: `file`, `line` or
            `block` (lines up to a blank one). Lines of `.jsonl` are objects with a text, their other keys go into json.

    Raises:
        ConfigError: a column that was named is not there. DataError: there is no text file.
    """
    files = _text_files(source)
    lines = [file for file in files if file.name.endswith(JSON_ENDINGS)]
    if lines and len(lines) < len(files):
        raise DataError(f"{source} holds {lines[0].name} beside {TEXT_ENDINGS[0]} files; name one sort of them")
    if lines:
        from trichord.building.lines import json_lines

        rows = watched((row for file in lines for row in json_lines(file)), reading, str(source))
        yield from numbered(rows, reading)
        return
    if reading.columns:
        raise ConfigError(f"--column names a key of .jsonl; {source} holds plain text ({files[0].name})")
    cut = {"file": _whole_file, "line": _lines, "block": _blocks}[documents]
    number = 0
    for file in files:
        for origin, text in cut(file):
            yield _row(number, origin, text, reading.fields)
            number += 1


def _text_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    endings = (*TEXT_ENDINGS, *JSON_ENDINGS)
    files = sorted(file for file in source.rglob("*") if file.is_file() and file.name.lower().endswith(endings))
    if not files:
        raise DataError(f"no text in {source}: expected a file, or a folder of files {', '.join(endings)}")
    return files


def _row(number: int, origin: str, text: str | BadRow, fields: FieldsConfig) -> BuildRow | BadRow:
    if isinstance(text, BadRow):
        return text
    try:
        return BuildRow(f"{number:09d}", {fields.text[0]: text_bytes(text)}, origin)
    except BadSample as error:
        return BadRow(origin, str(error))


def _whole_file(file: Path) -> Iterator[Document]:
    with open_bytes(file) as opened:
        data = opened.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        yield str(file), BadRow(str(file), f"more than {MAX_LINE_BYTES} bytes; cut it: --documents line or block")
        return
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        yield str(file), BadRow(str(file), f"not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8")
        return
    if text.strip():
        yield str(file), text


def _lines(file: Path) -> Iterator[Document]:
    for number, line in read_lines(file):
        if isinstance(line, BadRow) or line.strip():
            yield f"{file}, line {number}", line


def _blocks(file: Path) -> Iterator[Document]:
    """A block with a line that is no UTF-8 is bad as a whole."""
    block: list[str] = []
    bad: BadRow | None = None
    first, size = 1, 0
    for number, line in read_lines(file):
        if isinstance(line, BadRow):
            bad = bad or line
        elif line.strip():
            first = number if not block else first
            size += len(line)
            block.append(line)
            if size > MAX_LINE_BYTES:
                raise DataError(
                    f"{file}, line {first}: a block of more than {MAX_LINE_BYTES} characters; --documents line"
                )
        else:
            if block or bad:
                yield f"{file}, line {first}", bad or "\n".join(block)
            block, bad, size = [], None, 0
    if block or bad:
        yield f"{file}, line {first}", bad or "\n".join(block)
