"""Which sample comes when: a pure function of seed, shard sizes and weights, never of the hardware.

A lane is one row of the global batch. One epoch of a source is the sequence of its samples with the shards permuted
anew; lane l reads one contiguous slice of it, then its slice of the next epoch. A lane mixes its slices of all sources
(see `mixture`) and cuts the mixed sequence into windows, each permuted.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from trichord.core.seed import derive_seed
from trichord.shards.mixture import Mixture, integer_shares

_MAX_CACHED_ORDERS = 16


class SampleRef(NamedTuple):
    """One use of one sample: number of the source, epoch of that source, number of the sample in the source."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class LaneState:
    """All that is needed to plan the next window of a lane.

    window: number of that window. weights: shares of draws in it, per source. counts: draws per source since the shares
    last changed (new weights, a source that left). cursors: per source (epoch, position in the lane's slice of that
    epoch); epoch == epochs of the source: used up.
    """

    lane: int
    window: int
    weights: tuple[float, ...]
    counts: tuple[int, ...]
    cursors: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "LaneState":
        return LaneState(
            lane=fields["lane"],
            window=fields["window"],
            weights=tuple(fields["weights"]),
            counts=tuple(fields["counts"]),
            cursors=tuple((epoch, position) for epoch, position in fields["cursors"]),
        )


def keyed_permutation(n: int, seed: int) -> list[int]:
    """A permutation of range(n) that depends on (n, seed) alone, on every platform and with every library version."""
    keys = hashlib.shake_128(seed.to_bytes(8, "little")).digest(8 * n)
    return sorted(range(n), key=lambda i: (keys[8 * i : 8 * i + 8], i))


class _EpochOrder:
    """One epoch of a source: shards permuted, samples in order. Costs memory and time per shard, not per sample."""

    def __init__(self, shard_sizes: Sequence[int], first_samples: Sequence[int], seed: int):
        self._shards = keyed_permutation(len(shard_sizes), seed)
        self._ends = list(accumulate(shard_sizes[shard] for shard in self._shards))
        self._sizes = shard_sizes
        self._first_samples = first_samples

    def sample(self, position: int) -> int:
        place = bisect_right(self._ends, position)
        shard = self._shards[place]
        return self._first_samples[shard] + position - (self._ends[place] - self._sizes[shard])


class LanePlanner:
    """Plans the windows of all lanes.

    Args:
        seed: of the run. source_sizes: per source, the sample count of each shard. weights: per source, share of draws.
        epochs: per source, how often it is read through; None: for ever. num_lanes: rows of the global batch.
        window_samples: references per window.
    """

    def __init__(
        self,
        seed: int,
        source_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        epochs: Sequence[int | None],
        num_lanes: int,
        window_samples: int,
    ):
        if not len(source_sizes) == len(weights) == len(epochs) > 0:
            raise ValueError(
                f"got {len(source_sizes)} sources, {len(weights)} weights, {len(epochs)} epochs; need one each"
            )
        if num_lanes < 1 or window_samples < 1:
            raise ValueError(f"need at least one lane and one sample per window, got {num_lanes} and {window_samples}")
        self.num_lanes = num_lanes
        self._seed = seed
        self._window_samples = window_samples
        self._shard_sizes = [list(sizes) for sizes in source_sizes]
        self._first_samples = [[0, *accumulate(sizes)] for sizes in source_sizes]
        self._totals = [sum(sizes) for sizes in source_sizes]
        self._weights = tuple(float(weight) for weight in weights)
        # A source without samples is used up from the start.
        self._epochs = [count if total else 0 for count, total in zip(epochs, self._totals)]
        self._phases = [self._spread_phases(source) for source in range(len(weights))]
        self._orders: OrderedDict[tuple[int, int], _EpochOrder] = OrderedDict()

    def first_state(self, lane: int) -> LaneState:
        """State of a lane before its first window."""
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane must be 0 to {self.num_lanes - 1}, got {lane}")
        sources = range(len(self._weights))
        cursors = tuple(self._settled(source, lane, 0, 0) for source in sources)
        return LaneState(lane, 0, self._weights, (0,) * len(self._weights), cursors)

    def next_window(self, state: LaneState) -> tuple[list[SampleRef], LaneState]:
        """The references of a lane's next window, and the state after it.

        The window is shorter when the lane runs out in it, and ([], state) once the lane is used up for good. It is
        drawn by the weights in `state`: a window that was open when the weights were changed (a resumed run may) comes
        out as before. The planner's own weights hold from the next window on.
        """
        lane, counts, cursors = state.lane, list(state.counts), list(state.cursors)
        refs: list[SampleRef] = []
        active: list[int] | None = None
        mixture = None
        while len(refs) < self._window_samples:
            if active is None:
                active = [source for source in range(len(cursors)) if not self._used_up(source, cursors[source][0])]
                if not active:
                    break
                mixture = self._mixture(lane, active, state.weights)
            source = active[mixture.next_source([counts[i] for i in active])]
            epoch, position = cursors[source]
            refs.append(SampleRef(source, epoch, self._sample(source, lane, epoch, position)))
            counts[source] += 1
            cursors[source] = self._settled(source, lane, epoch, position + 1)
            if self._used_up(source, cursors[source][0]):
                # The shares of those that stay have changed, so their counts start anew.
                counts, active = [0] * len(counts), None
        if not refs:
            return [], state
        order = keyed_permutation(len(refs), derive_seed(self._seed, "window", lane, state.window))
        if state.weights != self._weights:
            counts = [0] * len(counts)
        after = LaneState(lane, state.window + 1, self._weights, tuple(counts), tuple(cursors))
        return [refs[i] for i in order], after

    def exhausted(self, state: LaneState) -> bool:
        """Whether the lane has no sample left, for good."""
        return all(self._used_up(source, epoch) for source, (epoch, _) in enumerate(state.cursors))

    def _used_up(self, source: int, epoch: int) -> bool:
        limit = self._epochs[source]
        return limit is not None and epoch >= limit

    def _slice(self, source: int, lane: int, epoch: int) -> tuple[int, int]:
        """Bounds of a lane's slice. Slots move on each epoch: with fewer samples than lanes, none starves."""
        slot = (lane + epoch) % self.num_lanes
        total = self._totals[source]
        return slot * total // self.num_lanes, (slot + 1) * total // self.num_lanes

    def _settled(self, source: int, lane: int, epoch: int, position: int) -> tuple[int, int]:
        """The cursor itself, or the start of the next epoch in which the lane has a sample, or (epochs, 0)."""
        while not self._used_up(source, epoch):
            start, stop = self._slice(source, lane, epoch)
            if position < stop - start:
                return epoch, position
            epoch, position = epoch + 1, 0
        return epoch, 0

    def _sample(self, source: int, lane: int, epoch: int, position: int) -> int:
        order = self._orders.get((source, epoch))
        if order is None:
            seed = derive_seed(self._seed, "epoch", source, epoch)
            order = _EpochOrder(self._shard_sizes[source], self._first_samples[source], seed)
            self._orders[source, epoch] = order
            if len(self._orders) > _MAX_CACHED_ORDERS + len(self._weights):
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end((source, epoch))
        return order.sample(self._slice(source, lane, epoch)[0] + position)

    def _spread_phases(self, source: int) -> list[int]:
        """Phase of a source per lane, in units of 1 / (2 num_lanes): evenly spread, in an order of its own."""
        order = keyed_permutation(self.num_lanes, derive_seed(self._seed, "phase", source))
        return [2 * place + 1 for place in order]

    def _mixture(self, lane: int, active: list[int], weights: Sequence[float]) -> Mixture:
        shares = integer_shares([weights[source] for source in active])
        return Mixture(shares, [self._phases[source][lane] for source in active], 2 * self.num_lanes)
