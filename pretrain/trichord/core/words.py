"""How messages name many things."""

from __future__ import annotations

import itertools
from collections.abc import Collection


def some(names: Collection[object], most: int) -> str:
    """The first `most` of them, and how many more there are."""
    named = ", ".join(map(str, itertools.islice(names, most)))
    return named + (f" and {len(names) - most} more" if len(names) > most else "")
