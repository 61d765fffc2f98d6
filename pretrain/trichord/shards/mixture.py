"""In which order a lane draws from its sources: every prefix holds the target shares to within one draw.

With shares w_i (sum 1) and c_i draws of source i among the first n, |c_i - n w_i| < 1 for every n and i. That leaves
freedom, and each lane uses it differently: its phase shifts where inside its window of 1 / w_i draws a source comes,
else all lanes would draw the rare source at the same step.

All arithmetic is on integers: the order is the same on every machine, however long a run is.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm


def integer_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as the smallest integers in the same ratio; a float counts as the decimal number it prints as.

    Raises:
        ValueError: a weight is not positive and finite.
    """
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    if any(fraction <= 0 for fraction in fractions):
        raise ValueError(f"weights must be positive, got {list(weights)}")
    denominator = lcm(*(fraction.denominator for fraction in fractions))
    numerators = [int(fraction * denominator) for fraction in fractions]
    common = gcd(*numerators)
    return tuple(numerator // common for numerator in numerators)


class Mixture:
    """Draws of one lane from sources with shares w_i = shares[i] / sum(shares).

    The k-th draw of source i (k from 0) may come as draw number n (from 1) once k / w_i < n, and must by (k + 1) / w_i
    rounded up. Its wish is (k + phase_i) / w_i. Each draw goes to the source with the earliest wish among those that
    may come and after whose draw all deadlines can still be kept. One such always exists: the earliest deadline first
    order of these windows never fails (Steiner and Yeomans 1993).

    Args:
        shares: positive integers. phases: per source, in [0, phase_unit).
    """

    def __init__(self, shares: Sequence[int], phases: Sequence[int], phase_unit: int):
        self._shares = tuple(shares)
        self._total = sum(shares)
        self._phases = tuple(phases)
        self._unit = phase_unit
        common = lcm(*shares)
        self._spacing = tuple(common // share for share in shares)

    def next_source(self, counts: Sequence[int]) -> int:
        """Number of the source to draw next, after counts[i] draws of each source i."""
        if len(self._shares) == 1:
            return 0
        draw = sum(counts) + 1
        eligible = [i for i, share in enumerate(self._shares) if counts[i] * self._total < draw * share]
        eligible.sort(key=lambda i: ((counts[i] * self._unit + self._phases[i]) * self._spacing[i], i))
        for source in eligible:
            if self._leaves_room(counts, source, draw):
                return source
        raise AssertionError(f"no source may be drawn after {list(counts)}: these counts were not made by this mixture")

    def _leaves_room(self, counts: Sequence[int], source: int, draw: int) -> bool:
        """Whether all other deadlines can be kept if `source` takes this draw.

        By draw d, source i needs floor(d w_i) draws. Taking this one for a source whose deadline is later than d costs
        one place before d, so there must be one: sum_i max(floor(d w_i), c_i) < d for each such d.
        """
        deadline = -(-(counts[source] + 1) * self._total // self._shares[source])
        for d in range(draw, deadline):
            needed = 0
            for share, count in zip(self._shares, counts):
                needed += max(d * share // self._total, count)
            if needed >= d:
                return False
        return True
