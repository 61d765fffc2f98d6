"""The list of all rows of a build, in files: written once by the process that plans, read in parts by those that write.

`rows.bin` holds one record per row: 4 bytes with the length of a JSON header, the header, then the bytes of the members
that exist nowhere else. `order.bin` holds the place of each record, 8 bytes each, in the order of the shards.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from trichord.building.rows import BuildRow, CellPart, Content, FilePart, RangePart, tar_bytes

ROWS_FILE = "rows.bin"
ORDER_FILE = "order.bin"
_PLACE_BYTES = 8
_PARTS: dict[str, type[FilePart] | type[RangePart] | type[CellPart]] = {
    "file": FilePart,
    "range": RangePart,
    "cell": CellPart,
}


class SpoolWriter:
    """Appends located rows to `rows.bin`; keeps place, size and group of each in memory (20 bytes a row).

    places: bytes from the start of the file; sizes: bytes in a tar; group_of: number in `groups`.
    """

    def __init__(self, folder: Path):
        self._file: IO[bytes] = (folder / ROWS_FILE).open("wb")
        self._end = 0
        self.places, self.sizes, self.group_of = array("Q"), array("Q"), array("I")
        self.groups: dict[str, int] = {}

    def append(self, row: BuildRow) -> None:
        blobs: list[bytes] = []
        members = []
        for ext, part in row.members.items():
            if isinstance(part, bytes):
                blobs.append(part)
                members.append([ext, "bytes", len(part)])
            else:
                members.append([ext, _name_of(part), *part])  # type: ignore[misc]
        header = json.dumps([row.key, row.origin, members], separators=(",", ":")).encode()
        record = b"".join((len(header).to_bytes(4, "little"), header, *blobs))
        self._file.write(record)
        self.places.append(self._end)
        self.sizes.append(tar_bytes(row))
        self.group_of.append(self.groups.setdefault(row.group, len(self.groups)))
        self._end += len(record)

    def __len__(self) -> int:
        return len(self.places)

    def close(self) -> None:
        self._file.close()


def write_order(folder: Path, places: array) -> None:
    """`order.bin` from the places in the order of the shards."""
    (folder / ORDER_FILE).write_bytes(places.tobytes())


def read_rows(folder: Path, first: int, last: int) -> Iterator[BuildRow]:
    """Rows `first` to `last` (not included) of the order."""
    places = array("Q")
    with (folder / ORDER_FILE).open("rb") as file:
        file.seek(first * _PLACE_BYTES)
        places.frombytes(file.read((last - first) * _PLACE_BYTES))
    with (folder / ROWS_FILE).open("rb") as file:
        for place in places:
            file.seek(place)
            key, origin, members = json.loads(file.read(int.from_bytes(file.read(4), "little")))
            yield BuildRow(key, {ext: _part(file, kind, values) for ext, kind, *values in members}, origin)


def _name_of(part: Content) -> str:
    return next(name for name, kind in _PARTS.items() if isinstance(part, kind))


def _part(file: IO[bytes], kind: str, values: list[Any]) -> Content:
    if kind == "bytes":
        return file.read(values[0])
    if kind == "cell":
        values[3] = tuple(values[3])
    return _PARTS[kind](*values)
