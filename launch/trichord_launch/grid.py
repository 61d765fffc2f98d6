"""`--grid key=v1,v2`: one run per combination of values, as lists of overrides."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from trichord.core.errors import ConfigError

MAX_CELLS = 1000


@dataclass(frozen=True)
class Cell:
    """One run of a grid. suffix: what it adds to the name of the run; overrides: `a.b=c`."""

    suffix: str
    overrides: tuple[str, ...]


def expand_grid(grid: Sequence[str]) -> list[Cell]:
    """All combinations, the last key changing fastest; one empty cell without a grid.

    Raises:
        ConfigError: not `key=v1,v2`, a key or a run twice, or too many runs.
    """
    axes = [_axis(text) for text in grid]
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--grid: a key stands twice in {', '.join(keys)}; give all its values at once")
    short = _short_names(keys)
    cells = [
        Cell(
            "".join(f"-{name}-{_plain(value)}" for name, value in zip(short, values)),
            tuple(f"{key}={value}" for key, value in zip(keys, values)),
        )
        for values in itertools.product(*(values for _, values in axes))
    ]
    if len(cells) > MAX_CELLS:
        raise ConfigError(f"--grid: {len(cells)} runs, at most {MAX_CELLS} in one array; split the grid")
    if len({cell.suffix for cell in cells}) < len(cells):
        raise ConfigError(f"--grid: two runs would have one name; a value stands twice in {' '.join(grid)}")
    return cells


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, rest = text.partition("=")
    values = _split(rest)
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key) or not all(values):
        raise ConfigError(f"--grid {text}: expected key=value,value such as engine.lr=1e-4,3e-4")
    return key, values


def _split(text: str) -> list[str]:
    """At commas outside of brackets: `[1,2],[3]` are two values."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def _short_names(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it where two end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return last if len(set(last)) == len(last) else [key.replace(".", "_") for key in keys]


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", value).replace("+", "").strip("_") or "_"
