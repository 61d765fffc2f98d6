"""How the rows of a step are shared out over ranks and micro-steps. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RowSplit:
    """rows: of the global batch, one from each lane; accumulation: micro-steps per step, equal on all ranks; sharing:
    neighbouring ranks that hold the same rows.

    wasted_frac: share of the computed rows that are empty, because rows do not divide evenly.
    """

    rows: int
    world_size: int
    micro_rows: int
    sharing: int = 1

    @property
    def groups(self) -> int:
        """Groups of ranks with rows of their own."""
        return self.world_size // self.sharing

    @property
    def accumulation(self) -> int:
        """ceil(rows / (groups * micro_rows))."""
        return math.ceil(self.rows / (self.groups * self.micro_rows))

    @property
    def computed_rows(self) -> int:
        return self.accumulation * self.groups * self.micro_rows

    @property
    def wasted_frac(self) -> float:
        return 1 - self.rows / self.computed_rows

    @property
    def idle_ranks(self) -> int:
        """Ranks that never have a row."""
        return max(0, self.groups - self.rows) * self.sharing

    def better(self) -> RowSplit | None:
        """The smaller `micro_rows` that wastes least, of several the largest; None if none is better than this.

        It never changes what is trained: rows and their order stay the same.
        """
        sizes = range(self.micro_rows, 0, -1)
        splits = [RowSplit(self.rows, self.world_size, size, self.sharing) for size in sizes]
        best = min(splits, key=lambda split: split.computed_rows)
        return best if best.micro_rows < self.micro_rows else None
