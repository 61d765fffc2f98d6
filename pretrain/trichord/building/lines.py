"""Text files read bit by bit: lines, JSON lines, the elements of a JSON list. `.gz` is unpacked on the way."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from trichord.building.rows import BadRow
from trichord.core.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
"""A longer line, or element of a JSON list, is refused: it could not be a sample, and would fill the memory."""


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """A file, unpacked where it ends in `.gz`. Raises DataError where it cannot be read, also later."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); check the file") from error


def read_lines(path: Path) -> Iterator[tuple[int, str | BadRow]]:
    """(number from 1, line without its end); a line that is not UTF-8 is a BadRow."""
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{path}, line {number}: longer than {MAX_LINE_BYTES} bytes; is it a text file?")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            try:
                yield number, line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: {error.reason} at byte {error.start} of the line; save it as UTF-8"
                yield number, BadRow(f"{path}, line {number}", reason)


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(`FILE, line N`, object) of every line that is not blank."""
    for number, line in read_lines(path):
        origin = f"{path}, line {number}"
        if isinstance(line, BadRow):
            yield origin, line
        elif line.strip():
            yield origin, _parsed(line, origin)


def json_elements(path: Path, prefix: str = "item") -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(`FILE, element N`, object) of a JSON list; prefix: `item` for the file itself, `images.item` for a list in it.

    The file is read once from front to back, one element in memory at a time.

    Raises:
        DataError: the file is not JSON; the message says after which element.
    """
    import ijson

    number = 0
    with open_bytes(path) as file:
        try:
            for number, element in enumerate(ijson.items(file, prefix, use_float=True), start=1):
                origin = f"{path}, element {number}"
                wrong = f"expected a JSON object, got {type(element).__name__}"
                yield origin, element if isinstance(element, dict) else BadRow(origin, wrong)
        except (ijson.JSONError, UnicodeDecodeError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path}: not JSON after {number} elements ({reason}); check the file") from error


def _parsed(line: str, origin: str) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(origin, f"not JSON at column {error.colno} ({error.msg})")
    except (RecursionError, ValueError) as error:
        return BadRow(origin, f"not JSON that can be read ({error})")
    return value if isinstance(value, dict) else BadRow(origin, f"expected a JSON object, got {type(value).__name__}")
