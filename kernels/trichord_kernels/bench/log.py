"""Figures of a GPU as a dated section of a Markdown log."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

_COLUMNS = {
    "kernel": "kernel",
    "shape": "shape",
    "dtype": "dtype",
    "against": "against",
    "time_ms": "ms",
    "torch_ms": "theirs, ms",
    "speedup": "speedup",
    "tflop_per_s": "TFLOP/s",
    "gb_per_s": "GB/s",
    "ceiling_share": "of the ceiling",
    "peak_mib": "peak, MiB",
    "torch_peak_mib": "theirs, MiB",
    "note": "note",
}


def append_section(file: Path, title: str, text: str, rows: Sequence[dict]) -> None:
    """Add `## DATE title`, the text and the rows as a table to the end of the file, which is made if need be."""
    section = f"## {date.today().isoformat()} {title}\n\n{text}\n\n{markdown_table(rows)}"
    before = file.read_text() if file.exists() else ""
    file.write_text(f"{before.rstrip()}\n\n{section}".lstrip())


def markdown_table(rows: Sequence[dict]) -> str:
    """Columns that no row has are left out; unknown ones come last in order of appearance; ends with a newline."""
    present = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in _COLUMNS if key in present] + [key for key in present if key not in _COLUMNS]
    lines = [[_COLUMNS.get(key, key) for key in keys], ["---"] * len(keys)]
    lines += [[_cell(row.get(key)) for key in keys] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
