"""How values are spread, in little memory however many there are: exact sums, quantiles to within half a percent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_PER_OCTAVE = 64  # a bin is 1.1 % wide
_ZERO = -(2**31)  # bin of all that is not positive
FAR_APART = 50
"""Ratio of the extremes from which on a histogram is drawn in equal ratios."""


@dataclass
class Distribution:
    """Values >= 0, counted in bins of equal ratio. count, total, least and most are exact."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    whole: bool = True
    """Whether all values so far were whole numbers; then quantiles are too."""
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, value: float, times: int = 1) -> None:
        self.count += times
        self.total += value * times
        self.least, self.most = min(self.least, value), max(self.most, value)
        self.whole = self.whole and value == int(value)
        self.bins[_bin(value)] += times

    def extend(self, values: Iterable[float]) -> None:
        for value in values:
            self.add(value)

    def merge(self, other: Distribution) -> None:
        self.count += other.count
        self.total += other.total
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.whole = self.whole and other.whole
        self.bins.update(other.bins)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantile(self, percent: float) -> float:
        """The least value that `percent` % of all values do not exceed, to within half a percent of it; nan of none."""
        if not self.count:
            return math.nan
        wanted, seen = math.ceil(self.count * percent / 100), 0
        for number in sorted(self.bins):
            seen += self.bins[number]
            if seen >= max(1, wanted):
                value = min(max(_middle(number), self.least), self.most)
                return round(value) if self.whole else value
        return self.most

    def columns(self, bars: int = 40) -> list[tuple[float, float, int]]:
        """(from, to, count) of a histogram between the extremes, in equal steps; in equal ratios if they are far apart.

        A bin that lies over a border is shared out by how much of it lies on each side.
        """
        if not self.count:
            return []
        low, high = self.least, self.most
        if high <= low:
            return [(low, high, self.count)]
        if self.whole and high - low < bars:  # a column per number
            edges = [low - 0.5 + i for i in range(int(high - low) + 2)]
        elif low > 0 and high / low > FAR_APART:
            edges = [low * (high / low) ** (i / bars) for i in range(bars + 1)]
        else:
            edges = [low + (high - low) * i / bars for i in range(bars + 1)]
        counts = [0.0] * (len(edges) - 1)
        for number, count in self.bins.items():
            self._share_out(number, count, edges, counts)
        return [(start, end, round(count)) for start, end, count in zip(edges, edges[1:], counts)]

    def _share_out(self, number: int, count: int, edges: list[float], counts: list[float]) -> None:
        """Add a bin to the columns that it overlaps; one that holds a single whole number to that number's column."""
        start, end = max(_edge(number), self.least), min(_edge(number + 1), self.most)
        if self.whole and _edge(number + 1) - _edge(number) < 1:
            start = end = min(max(round(_middle(number)), self.least), self.most)
        first, last = _place(start, edges), _place(end, edges)
        if first == last:
            counts[first] += count
            return
        for column in range(first, last + 1):
            inside = min(end, edges[column + 1]) - max(start, edges[column])
            counts[column] += count * max(0.0, inside) / (end - start)

    def to_json(self) -> dict[str, Any]:
        """count, sum, mean, min, max (exact), p1 ... p99 (within half a percent)."""
        if not self.count:
            return {"count": 0}
        total = round(self.total) if self.whole else self.total
        facts = {"count": self.count, "sum": total, "mean": self.mean, "min": self.least, "max": self.most}
        return {**facts, **{f"p{percent}": self.quantile(percent) for percent in QUANTILES}}


def _bin(value: float) -> int:
    return math.floor(math.log2(value) * _PER_OCTAVE) if value > 0 else _ZERO


def _edge(number: int) -> float:
    return 0.0 if number <= _ZERO + 1 else 2.0 ** (number / _PER_OCTAVE)


def _middle(number: int) -> float:
    return 0.0 if number == _ZERO else 2.0 ** ((number + 0.5) / _PER_OCTAVE)


def _place(value: float, edges: list[float]) -> int:
    """The bar that a value falls into."""
    low, high = 0, len(edges) - 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if edges[middle] <= value else (low, middle - 1)
    return low
