"""Every tile table there is."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from trichord_kernels import tables
from trichord_kernels.tables.tile import Tile

Table = dict[tuple, Tile]


def all_tables() -> dict[str, Table]:
    """{"attention.FORWARD": the dict itself, ...}: module-level dicts in tables/<op>.py that hold tiles by tuples."""
    found = {}
    for module_info in sorted(iter_modules(tables.__path__), key=lambda module: module.name):
        module = import_module(f"{tables.__name__}.{module_info.name}")
        found |= {f"{module_info.name}.{name}": value for name, value in vars(module).items() if _is_table(value)}
    return found


def _is_table(value: object) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, tuple) and isinstance(tile, Tile) for key, tile in value.items())
    )
