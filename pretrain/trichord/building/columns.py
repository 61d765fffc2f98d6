"""Which columns of a table become which fields: what the user named must be there, and what was found is told."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from trichord.building.rows import BadRow
from trichord.building.tabular import FIELD_COLUMNS, TableReading
from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.core.words import some

_log = get_logger(__name__)
_MAX_NAMED = 20
Origin = tuple[str, "dict[str, Any] | BadRow"]


def check_columns(reading: TableReading, present: Collection[str], place: str) -> None:
    """Raise ConfigError where a column that the user named is not among those of `place` (a file, its rows)."""
    absent = [(name, column) for name, column in reading.columns.items() if column not in present]
    if absent:
        name, column = absent[0]
        raise ConfigError(f"--column {name}={column}: no column {column} in {place}; there are {_named(present)}")


def tell_columns(reading: TableReading, present: Collection[str], place: str) -> None:
    """One line of the log: which columns become which fields, and which stay in the json."""
    taken = {name: reading.column(name, present) for name in FIELD_COLUMNS}
    taken = {name: column for name, column in taken.items() if column in present}
    rest = [column for column in present if column not in taken.values()]
    fields = ", ".join(f"{name} from column {column}" for name, column in taken.items())
    hint = "" if not rest or reading.columns else " (another is named by --column text=caption)"
    _log.info("%s: %s; in json: %s%s", place, fields or "no field", _named(rest), hint)


def watched(rows: Iterable[Origin], reading: TableReading, place: str) -> Iterator[Origin]:
    """JSON rows as they come. Those of the first are told; at the end, one must have had each column that was named.

    Raises:
        ConfigError: none of the rows has such a column.
    """
    seen: dict[str, None] = {}
    for origin, row in rows:
        if isinstance(row, dict):
            if not seen:
                tell_columns(reading, row, f"{place}, first row")
            if len(seen) <= _MAX_NAMED or not {*reading.columns.values()} <= {*seen}:
                seen.update(dict.fromkeys(row))
        yield origin, row
    if seen:
        check_columns(reading, seen, f"any row of {place}")


def _named(columns: Collection[str]) -> str:
    return some(columns, _MAX_NAMED) or "none"
