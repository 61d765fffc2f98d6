"""In which order a lane draws from its sources: every prefix holds the target shares to within one draw.

With shares w_i (sum 1) and c_i draws of source i among the first n, |c_i - n w_i| < 1 for every n and i. That leaves
freedom, and each lane uses it differently: its phase shifts where inside its window of 1 / w_i draws a source comes,
else all lanes would draw the rare source at the same step.

All arithmetic is on integers: the order is the same on every machine, however long a run is.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush, heapreplace

_FIRST_SETTLED_CHECK = 32
MAX_LOOK_AHEAD = 1 << 14
"""Draws that are looked ahead one by one; what needs more is proven at once or put off (see `Mixture._fits`)."""


class UnreachableCountsError(ValueError):
    """No run of a mixture leads to these counts."""


class Mixture:
    """Draws of one lane from sources with shares w_i = shares[i] / sum(shares), going on after counts[i] draws of each.

    The k-th draw of source i (k from 0) may come as draw number n (from 1) once k / w_i < n, and must by (k + 1) / w_i
    rounded up. Its wish is (k + phase_i) / w_i. Each draw goes to the source with the earliest wish among those that
    may come and after whose draw all deadlines can still be kept. One such always exists: the earliest deadline first
    order of these windows never fails (Steiner and Yeomans 1993).

    The slack of draw number d is d minus the draws that are made already or must be by d. It is never negative, and a
    draw for a source whose deadline is later than d takes one from it; so a source may come if its deadline is not
    after the first d without slack. Over all draws, keeping the slack costs as many additions as there are sources.

    Args:
        shares: positive integers. phases: per source, in [0, phase_unit). counts: as earlier draws with the same shares
            and phases left them; none: from the start.

    Raises:
        UnreachableCountsError: no run of this mixture leads to these counts; some show only when draws are made.
    """

    def __init__(self, shares: Sequence[int], phases: Sequence[int], phase_unit: int, counts: Sequence[int] = ()):
        self.counts = list(counts) or [0] * len(shares)
        self._shares = tuple(shares)
        self._total = sum(shares)
        self._phases = tuple(phases)
        self._unit = phase_unit
        self._draw = sum(self.counts) + 1
        self._wishes = [self._wish(i) for i in range(len(shares))]
        self._releases = [self._release(i) for i in range(len(shares))]
        self._deadlines = [self._deadline(i, self.counts[i]) for i in range(len(shares))]
        # Slack of the draws from _first to _end (not with it), as far as it was needed; the jobs that fall due behind.
        self._first = self._end = self._draw
        self._slack: list[int] = []
        self._needed = self._draw - 1
        self._due = [(deadline, i, self.counts[i]) for i, deadline in enumerate(self._deadlines)]
        heapify(self._due)
        self._without_slack: list[int] = []  # heap of the draws before _end that have none
        self._ahead_at, self._ahead = (0, 0), 0
        self._check_counts()

    def draw(self) -> int:
        """Number of the source that is drawn next; counts it."""
        if len(self._shares) == 1:
            self.counts[0] += 1
            return 0
        wishes = self._wishes
        source = wishes.index(min(wishes))
        if self._releases[source] > self._draw or not self._fits(source):
            source = self._next_best()
        self._take(source)
        return source

    def _next_best(self) -> int:
        """The source with the earliest wish that may come; if none is known to, the one with the earliest deadline."""
        released = [source for source, release in enumerate(self._releases) if release <= self._draw]
        for source in sorted(released, key=self._wishes.__getitem__):
            if self._fits(source):
                return source
        source = min(released, key=self._deadlines.__getitem__, default=None)
        if source is not None and not self._without_slack:
            return source
        raise self._unreachable()

    def _fits(self, source: int) -> bool:
        """Whether all other deadlines can be kept if `source` takes this draw: all draws before its own have slack.

        Slack is looked at draw by draw, but not to the end of a very rare source's window: see `_settled`. Where
        neither answers within MAX_LOOK_AHEAD draws, which takes several sources rarer than that, the source is put
        off: safe, as the source with the earliest deadline always fits.
        """
        deadline, without_slack = self._deadlines[source], self._without_slack
        while not without_slack and self._end < deadline:
            ahead = self._end - self._draw
            if ahead >= _FIRST_SETTLED_CHECK and (ahead & (ahead - 1) == 0 or ahead >= MAX_LOOK_AHEAD):
                if self._settled(source):
                    return True
                if ahead >= MAX_LOOK_AHEAD:
                    return False
            self._extend_slack()
        return not without_slack or deadline <= without_slack[0]

    def _settled(self, source: int) -> bool:
        """Whether, with this draw for `source`, no deadline from `_end` on can be missed for what was drawn so far.

        With e_i = max(c_i - d w_i, 0), what source i is ahead of its share at draw d, the draws needed by d are
        sum_i max(floor(d w_i), c_i) <= d + sum_i e_i. Both ends being integers, sum_i e_i < 1 proves that they are at
        most d; and e_i only falls as d grows.
        """
        total, draw = self._total, self._end
        if self._ahead_at != (self._draw, draw):
            leads = (count * total - draw * share for count, share in zip(self.counts, self._shares))
            self._ahead_at, self._ahead = (self._draw, draw), sum(lead for lead in leads if lead > 0)
        own = self.counts[source] * total - draw * self._shares[source]
        return self._ahead - max(0, own) + max(0, own + total) < total

    def _extend_slack(self) -> None:
        """Append the slack of one more draw: count the jobs that fall due at it, unless they are done already."""
        draw, due, counts = self._end, self._due, self.counts
        while due[0][0] == draw:
            _, source, job = due[0]
            if job >= counts[source]:
                self._needed += 1
            heapreplace(due, (self._deadline(source, job + 1), source, job + 1))
        self._slack.append(draw - self._needed)
        if self._needed > draw:
            raise self._unreachable()
        if self._needed == draw:
            heappush(self._without_slack, draw)
        self._end += 1

    def _take(self, source: int) -> None:
        """Give this draw to `source`: one less slack before its deadline."""
        deadline, slack, first, without_slack = self._deadlines[source], self._slack, self._first, self._without_slack
        if deadline >= self._end:
            self._needed += 1  # done before `_extend_slack` came to it
        self._draw += 1
        self.counts[source] += 1
        for place in range(self._draw - first, min(deadline, self._end) - first):
            slack[place] -= 1
            if not slack[place]:
                heappush(without_slack, place + first)
        if self._end < self._draw:
            self._extend_slack()
        while without_slack and without_slack[0] < self._draw:
            heappop(without_slack)
        self._wishes[source] = self._wish(source)
        self._releases[source] = self._release(source)
        self._deadlines[source] = self._deadline(source, self.counts[source])

    def _wish(self, source: int) -> int:
        """When the next draw of a source would best come, in 1 / (256 phase_unit) draws."""
        return ((self.counts[source] * self._unit + self._phases[source]) * self._total << 8) // self._shares[source]

    def _release(self, source: int) -> int:
        return self.counts[source] * self._total // self._shares[source] + 1

    def _deadline(self, source: int, job: int) -> int:
        return -(-(job + 1) * self._total // self._shares[source])

    def _check_counts(self) -> None:
        done = self._draw - 1
        for count, share in zip(self.counts, self._shares, strict=True):
            if abs(count * self._total - done * share) >= self._total:
                raise self._unreachable()

    def _unreachable(self) -> UnreachableCountsError:
        return UnreachableCountsError(f"no run with shares {list(self._shares)} leads to counts {self.counts}")
