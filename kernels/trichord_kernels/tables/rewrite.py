"""Change entries of a tile table in its source, and nothing else: a pure function over the text."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from trichord_kernels.errors import KernelError
from trichord_kernels.tables.tile import Tile


def rewrite_table(text: str, table: str, changes: Mapping[tuple, Tile]) -> str:
    """The source `text` of a tables/<op>.py with the entries `changes` of the dict literal `table` set.

    Values of entries that are there are replaced where they stand; new ones get a line behind the last entry of their
    architecture, else at the end. Comments, other entries and other code keep every character.

    Raises:
        KernelError: the file has no dict literal of that name.
    """
    for key, tile in changes.items():
        text = _set_entry(text, table, key, tile)
    return text


def tile_source(tile: Tile) -> str:
    source = tile.source.replace("\\", "\\\\").replace('"', '\\"')
    return f'Tile({tile.block_m}, {tile.block_n}, {tile.num_warps}, {tile.num_stages}, "{source}")'


def _set_entry(text: str, table: str, key: tuple, tile: Tile) -> str:
    literal = _find_literal(text, table)
    entries = {_literal_key(node): value for node, value in zip(literal.keys, literal.values)}
    lines = text.splitlines(keepends=True)
    if key in entries:
        return _replaced(lines, entries[key], tile_source(tile))
    names = ", ".join(f'"{part}"' if isinstance(part, str) else repr(part) for part in key)
    line = f"    ({names}{',' if len(key) == 1 else ''}): {tile_source(tile)},\n"
    same_arch = [value.end_lineno or 0 for known, value in entries.items() if known and known[0] == key[0]]
    closing_line = literal.end_lineno or 1
    if lines[closing_line - 1].strip() != "}":
        raise _no_literal(table, "one entry per line, its closing brace on a line of its own")
    after = max(same_arch, default=closing_line - 1)
    return "".join([*lines[:after], line, *lines[after:]])


def _find_literal(text: str, table: str) -> ast.Dict:
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == table for target in targets):
            value = getattr(node, "value", None)
            if isinstance(value, ast.Dict):
                return value
    raise _no_literal(table, "a dict literal at the top level of its file")


def _no_literal(table: str, expected: str) -> KernelError:
    return KernelError(f"table {table}: expected {expected}, got none; see docs/kernels/tables.md")


def _literal_key(node: ast.expr | None) -> tuple | None:
    """None for what a person wrote in another way (`**more`, names): it stays as it is."""
    try:
        key = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return key if isinstance(key, tuple) else None


def _replaced(lines: list[str], node: ast.expr, source: str) -> str:
    """ast counts columns in bytes of UTF-8."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before = lines[first].encode()[: node.col_offset].decode()
    after = lines[last].encode()[node.end_col_offset :].decode()
    return "".join([*lines[:first], before + source + after, *lines[last + 1 :]])
