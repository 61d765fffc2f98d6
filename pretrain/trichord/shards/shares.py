"""From weights to shares of draws: groups, schedules, tokens, and what a source that runs out leaves to the others.

All of it is exact rational arithmetic on decimals as they print, so every machine gets the same integers.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

from trichord.shards.config import ShardsConfig

FINEST_SHARE = 1 << 40
"""Shares whose exact denominator is larger are rounded to parts of this: less than a draw in 10^12."""

Path = tuple[str, ...]


class WeightTree:
    """Weights of sources in nested groups.

    Args:
        paths: the group of each source, outermost name first; () stands beside the outermost groups. weights: of each
            source, relative to the sources and groups beside it. schedules: (step, weight) pairs of each source, steps
            ascending. group_weights: by path, names joined with `/`. tokens: mean tokens per draw of each source, to
            six digits: weights share out tokens, and a source of longer samples is drawn less often.

    Raises:
        ValueError: a weight or mean is not positive and finite, a group has no weight, steps do not ascend.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        weights: Sequence[float],
        schedules: Sequence[Sequence[tuple[int, float]]],
        group_weights: Mapping[str, float],
        tokens: Sequence[float],
    ):
        self._paths = [tuple(path) for path in paths]
        named = {path[:depth] for path in self._paths for depth in range(1, len(path) + 1)}
        missing = sorted("/".join(path) for path in named if "/".join(path) not in group_weights)
        if missing:
            raise ValueError(f"groups {missing} have no weight, only {sorted(group_weights)} have")
        self._group_weights = {path: exact(group_weights["/".join(path)]) for path in named}
        self._weights = [
            [exact(first), *(exact(weight) for _, weight in schedule)] for first, schedule in zip(weights, schedules)
        ]
        self._steps = [[step for step, _ in schedule] for schedule in schedules]
        if any(steps != sorted(set(steps)) for steps in self._steps):
            raise ValueError(f"the steps of a schedule must ascend, got {self._steps}")
        self._changes = sorted({step for steps in self._steps for step in steps})
        self._tokens = [exact(float(f"{mean:.6g}")) for mean in tokens]
        self._known: dict[tuple[int, tuple[int, ...]], tuple[int, ...]] = {}

    def shares(self, step: int, active: Sequence[int]) -> tuple[int, ...]:
        """Share of draws of every source in the window that opens at `step`, 0 for those not in `active`.

        A group has its weight as long as one of its sources is active.
        """
        key = (bisect_right(self._changes, step), tuple(active))
        if key not in self._known:
            weights = [values[bisect_right(steps, step)] for values, steps in zip(self._weights, self._steps)]
            portions = self._portions(weights, active)
            draws = {source: portion / self._tokens[source] for source, portion in portions.items()}
            self._known[key] = self._all_sources(draws)
        return self._known[key]

    def without(self, shares: Sequence[int], left: int, active: Sequence[int]) -> tuple[int, ...]:
        """`shares` after source `left` has run out: what it had goes to the `active` ones of its innermost group that
        still has any, each in proportion to its own.

        Draws for draws, of the shares alone: a window goes on as it began after weights were changed.
        """
        path = self._paths[left]
        depth = max((_common(path, self._paths[source]) for source in active), default=0)
        heirs = {source for source in active if self._paths[source][:depth] == path[:depth]}
        draws = {source: Fraction(shares[source]) for source in active}
        if heirs:
            factor = 1 + Fraction(shares[left], sum(shares[source] for source in heirs))
            draws |= {source: draws[source] * factor for source in heirs}
        return self._all_sources(draws)

    def _portions(self, weights: Sequence[Fraction], active: Iterable[int]) -> dict[int, Fraction]:
        """Part of the whole of each active source, group by group."""
        beside: dict[Path, Fraction] = {}  # sum of the weights in a group, of what is active
        present: set[Path] = set()
        for source in active:
            path = self._paths[source]
            beside[path] = beside.get(path, Fraction(0)) + weights[source]
            for depth in range(len(path), 0, -1):
                group = path[:depth]
                if group in present:
                    break
                present.add(group)
                beside[group[:-1]] = beside.get(group[:-1], Fraction(0)) + self._group_weights[group]
        part: dict[Path, Fraction] = {(): Fraction(1)}
        for group in sorted(present, key=len):
            part[group] = part[group[:-1]] * self._group_weights[group] / beside[group[:-1]]
        return {s: part[self._paths[s]] * weights[s] / beside[self._paths[s]] for s in active}

    def _all_sources(self, draws: Mapping[int, Fraction]) -> tuple[int, ...]:
        shares = dict(zip(draws, whole_shares(list(draws.values()))))
        return tuple(shares.get(source, 0) for source in range(len(self._paths)))


def exact(number: float) -> Fraction:
    """A float as the decimal number it prints as. Raises ValueError unless it is positive and finite."""
    if not 0 < number < float("inf"):
        raise ValueError(f"weights must be positive and finite, got {number}")
    return Fraction(repr(float(number)))


def target_shares(shards: ShardsConfig, step: int) -> dict[str, float]:
    """Source name -> the share of draws that its weight asks for at `step`, as if none had run out.

    Empty where weights share out tokens: how many samples that is depends on the samples.
    """
    sources = shards.sources
    if shards.weights_by == "tokens" and len(sources) > 1:
        return {}
    tree = WeightTree(
        [tuple(source.group.split("/")) if source.group else () for source in sources],
        [source.weight for source in sources],
        [source.weight_schedule for source in sources],
        shards.group_weights,
        [1.0] * len(sources),
    )
    shares = tree.shares(step, range(len(sources)))
    return {source.name: share / sum(shares) for source, share in zip(sources, shares)}


def whole_shares(fractions: Sequence[Fraction]) -> tuple[int, ...]:
    """Positive fractions as the smallest integers in the same ratio, rounded where these add up to > FINEST_SHARE.

    Rounding gives each at least 1, and what is over to the largest remainders, the first of equals first.
    """
    if not fractions:
        return ()
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    numerators = [int(fraction * denominator) for fraction in fractions]
    common = gcd(*numerators)
    shares = [numerator // common for numerator in numerators]
    total = sum(shares)
    if total <= FINEST_SHARE:
        return tuple(shares)
    rounded = [max(1, share * FINEST_SHARE // total) for share in shares]
    over = max(0, FINEST_SHARE - sum(rounded))
    by_remainder = sorted(range(len(shares)), key=lambda i: (-(shares[i] * FINEST_SHARE % total), i))
    for i in by_remainder[:over]:
        rounded[i] += 1
    return tuple(rounded)


def _common(path: Path, other: Path) -> int:
    """How many groups two paths have in common, from the outermost."""
    return next((depth for depth, (a, b) in enumerate(zip(path, other)) if a != b), min(len(path), len(other)))
