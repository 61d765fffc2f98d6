"""One source through its epochs: shards permuted anew in each, one contiguous slice for each lane."""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from trichord.core.seed import derive_seed

_MAX_CACHED_ORDERS = 4


class Run(NamedTuple):
    """Samples that follow each other in an epoch: position p is sample p + shift, up to (not with) position `stop`."""

    shift: int
    stop: int


class SourceEpochs:
    """The order of one source's samples in each epoch. Costs memory and time per shard, not per sample.

    Args:
        number: of the source, seeds its order. shard_sizes: samples per shard; it may grow at its end. shards_at: how
            many shards belong to an epoch, None: all to all epochs. epochs: how often it is read, None: for ever.
    """

    def __init__(
        self,
        seed: int,
        number: int,
        num_lanes: int,
        shard_sizes: Sequence[int],
        shards_at: Callable[[int], int] | None,
        epochs: int | None,
    ):
        self._seed = seed
        self._number = number
        self._num_lanes = num_lanes
        self._shards_at = shards_at
        self._sizes = shard_sizes
        self._starts = [0, *accumulate(shard_sizes)]
        self._orders: OrderedDict[int, _EpochOrder] = OrderedDict()
        # A source without samples is used up from the start.
        self._epochs = epochs if self.total(0) else 0

    def used_up(self, epoch: int) -> bool:
        """Whether there is no such epoch."""
        return self._epochs is not None and epoch >= self._epochs

    def total(self, epoch: int) -> int:
        """Samples of an epoch."""
        return self._starts[self._num_shards(epoch)]

    def slice(self, lane: int, epoch: int) -> tuple[int, int]:
        """Bounds of a lane's slice. Slots move on each epoch: with fewer samples than lanes, none starves."""
        slot, total = (lane + epoch) % self._num_lanes, self.total(epoch)
        return slot * total // self._num_lanes, (slot + 1) * total // self._num_lanes

    def settled(self, lane: int, epoch: int, position: int) -> tuple[int, int]:
        """The cursor itself, or the start of the next epoch in which the lane has a sample, or (epochs, 0)."""
        while not self.used_up(epoch):
            start, stop = self.slice(lane, epoch)
            if position < stop - start:
                return epoch, position
            epoch, position = epoch + self._epochs_to_skip(lane, epoch, stop), 0
        return epoch if self._epochs is None else self._epochs, 0

    def run(self, lane: int, epoch: int, position: int) -> Run:
        """The samples from a lane's position on that lie in one shard, in positions of the lane's slice."""
        order = self._orders.get(epoch)
        if order is None:
            order = _EpochOrder(
                self._sizes,
                self._starts,
                self._num_shards(epoch),
                derive_seed(self._seed, "epoch", self._number, epoch),
            )
            self._orders[epoch] = order
            if len(self._orders) > _MAX_CACHED_ORDERS:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end(epoch)
        start, stop = self.slice(lane, epoch)
        shift, end = order.run(start + position)
        return Run(shift + start, min(end, stop) - start)

    def _num_shards(self, epoch: int) -> int:
        if self._shards_at is None:
            return len(self._starts) - 1
        count = self._shards_at(epoch)
        while len(self._starts) <= count:
            self._starts.append(self._starts[-1] + self._sizes[len(self._starts) - 1])
        return count

    def _epochs_to_skip(self, lane: int, epoch: int, stop: int) -> int:
        """From the end of the lane's slice to its next epoch that can have a sample for it.

        A source of few samples leaves most slots empty. Where all epochs are alike, the next slot that is not is known:
        the first s with (s + 1) total // lanes > stop.
        """
        if self._shards_at is not None:
            return 1
        slot = (lane + epoch) % self._num_lanes
        if slot == self._num_lanes - 1:
            return 1  # the slots begin anew
        following = -(-(stop + 1) * self._num_lanes // self.total(epoch)) - 1
        return max(1, following - slot)


class _EpochOrder:
    """One epoch: shards permuted, samples in order."""

    def __init__(self, sizes: Sequence[int], starts: Sequence[int], count: int, seed: int):
        self._shards = keyed_permutation(count, seed)
        self._ends = list(accumulate(sizes[shard] for shard in self._shards))
        self._sizes = sizes
        self._starts = starts

    def run(self, position: int) -> tuple[int, int]:
        """(shift, end): positions from `position` to `end` are the samples position + shift, ... of one shard."""
        place = bisect_right(self._ends, position)
        shard = self._shards[place]
        return self._starts[shard] - (self._ends[place] - self._sizes[shard]), self._ends[place]


def keyed_permutation(n: int, seed: int) -> list[int]:
    """A permutation of range(n) that depends on (n, seed) alone, on every platform and with every library version."""
    keys = hashlib.shake_128(seed.to_bytes(8, "little")).digest(8 * n)
    return sorted(range(n), key=lambda i: (keys[8 * i : 8 * i + 8], i))
