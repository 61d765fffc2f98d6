"""Which sample comes when: a pure function of seed, shard sizes and weights, never of the hardware.

A lane is a part of the global batch. One epoch of a source is the sequence of its samples with the shards permuted
anew; lane l reads one contiguous slice of it, then its slice of the next epoch (see `epochs`). A lane mixes its slices
of all sources (see `mixture`, `shares`) and cuts the mixed sequence into windows, each permuted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from trichord.core.errors import CheckpointError
from trichord.core.seed import derive_seed
from trichord.shards.epochs import SourceEpochs, keyed_permutation
from trichord.shards.mixture import Mixture, UnreachableCountsError
from trichord.shards.shares import WeightTree

__all__ = ["LanePlanner", "LaneSource", "LaneState", "SampleRef", "keyed_permutation"]


class SampleRef(NamedTuple):
    """One use of one sample: number of the source, epoch of that source, number of the sample in the source."""

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class LaneSource:
    """What the order needs to know of a source.

    shard_sizes: samples per shard, in order of appearance; it may grow at its end. weight: share of draws relative to
    the sources and groups beside it. schedule: (step, weight) pairs, from each step on. group: names, outermost first.
    epochs: how often it is read through, None: for ever. shards_at: how many of the shards an epoch has; None: all.
    tokens_per_sample: divides its share of draws where weights share out tokens.
    """

    shard_sizes: Sequence[int]
    weight: float = 1.0
    schedule: tuple[tuple[int, float], ...] = ()
    group: tuple[str, ...] = ()
    epochs: int | None = None
    shards_at: Callable[[int], int] | None = None
    tokens_per_sample: float = 1.0


@dataclass(frozen=True)
class LaneState:
    """All that is needed to plan the next window of a lane.

    window: number of that window. open: whether `shares` are those of that window, fixed when its first row was given;
    else they are those that the window before ended with. counts: draws per source since the shares last changed (new
    weights, a source that left). cursors: per source (epoch, position in the lane's slice of that epoch); epoch ==
    epochs of the source: used up.
    """

    lane: int
    window: int
    open: bool
    shares: tuple[int, ...]
    counts: tuple[int, ...]
    cursors: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "LaneState":
        """Raises KeyError, TypeError or ValueError when the fields are damaged."""
        state = LaneState(
            lane=_count(saved["lane"]),
            window=_count(saved["window"]),
            open=saved["open"],
            shares=tuple(_count(share) for share in saved["shares"]),
            counts=tuple(_count(count) for count in saved["counts"]),
            cursors=tuple((_count(epoch), _count(position)) for epoch, position in saved["cursors"]),
        )
        if not isinstance(state.open, bool) or not len(state.shares) == len(state.counts) == len(state.cursors):
            raise ValueError(f"`open` must be a bool and each source have a share, a count and a cursor, got {saved}")
        return state


class LanePlanner:
    """Plans the windows of all lanes.

    Args:
        seed: of the run. sources: at least one. num_lanes: parts of the global batch. window_samples: references per
            window. group_weights: by path of the group, its names joined with `/`.

    Raises:
        ValueError: an argument is out of range, a weight not positive, a group without weight.
    """

    def __init__(
        self,
        seed: int,
        sources: Sequence[LaneSource],
        *,
        num_lanes: int,
        window_samples: int,
        group_weights: Mapping[str, float] | None = None,
    ):
        if not sources or num_lanes < 1 or window_samples < 1:
            raise ValueError(
                "need at least one source, one lane and one sample per window, "
                f"got {len(sources)}, {num_lanes} and {window_samples}"
            )
        self.num_lanes = num_lanes
        self._seed = seed
        self._window_samples = window_samples
        self._epochs = [
            SourceEpochs(seed, number, num_lanes, source.shard_sizes, source.shards_at, source.epochs)
            for number, source in enumerate(sources)
        ]
        self._tree = WeightTree(
            [source.group for source in sources],
            [source.weight for source in sources],
            [source.schedule for source in sources],
            group_weights or {},
            [source.tokens_per_sample for source in sources],
        )
        self._phases = [self._spread_phases(source) for source in range(len(sources))]

    def first_state(self, lane: int) -> LaneState:
        """State of a lane before its first window."""
        if not 0 <= lane < self.num_lanes:
            raise ValueError(f"lane must be 0 to {self.num_lanes - 1}, got {lane}")
        nothing = (0,) * len(self._epochs)
        cursors = tuple(epochs.settled(lane, 0, 0) for epochs in self._epochs)
        return LaneState(lane, 0, False, nothing, nothing, cursors)

    def opened(self, state: LaneState, step: int) -> LaneState:
        """The state with its window open at `step`: its shares are those of the weights of that step, from now on.

        A window that is open already stays as it is, and so does a lane that is used up. Keep the opened state as long
        as rows of the window are due: a run that is resumed in its middle gets the same window from it, at whatever
        step and with whatever weights.
        """
        active = self._active(state)
        if state.open or not active:
            return state
        shares = self._tree.shares(step, active)
        counts = state.counts if shares == state.shares else (0,) * len(shares)
        return replace(state, open=True, shares=shares, counts=counts)

    def next_window(self, state: LaneState, step: int) -> tuple[list[SampleRef], LaneState]:
        """The references of a lane's next window, opened at `step` unless it is open, and the state after it.

        The window is shorter when the lane runs out in it, and ([], state) once the lane is used up for good.

        Raises:
            CheckpointError: the state does not belong to this order.
        """
        self._check(state)
        active = self._active(state)
        if not active:
            return [], state
        state = self.opened(state, step)
        drawing = _Drawing(self._epochs, self._tree, self._phases, self.num_lanes, state, active)
        try:
            refs = drawing.draw(self._window_samples)
        except UnreachableCountsError as error:
            raise CheckpointError(
                f"the loader state of lane {state.lane} is damaged: {error}; use another checkpoint"
            ) from error
        order = keyed_permutation(len(refs), derive_seed(self._seed, "window", state.lane, state.window))
        return [refs[i] for i in order], drawing.after()

    def exhausted(self, state: LaneState) -> bool:
        """Whether the lane has no sample left, for good."""
        return not self._active(state)

    def _active(self, state: LaneState) -> list[int]:
        return [i for i, epochs in enumerate(self._epochs) if not epochs.used_up(state.cursors[i][0])]

    def _check(self, state: LaneState) -> None:
        """A state from a checkpoint may be damaged, or of another config than its caller thinks."""
        if len(state.cursors) != len(self._epochs) or state.lane >= self.num_lanes:
            raise CheckpointError(
                f"the loader state is of lane {state.lane} with {len(state.cursors)} sources, the run has lanes 0 to "
                f"{self.num_lanes - 1} and {len(self._epochs)} sources; resume with the config it was made with"
            )
        for source in self._active(state):
            epoch, position = state.cursors[source]
            start, stop = self._epochs[source].slice(state.lane, epoch)
            if position >= stop - start or (state.open and not state.shares[source]):
                raise CheckpointError(
                    f"lane {state.lane} stands at sample {position} of {stop - start} in epoch {epoch} of source "
                    f"number {source}, with share {state.shares[source]}: the loader state is damaged or of other "
                    "data; use another checkpoint"
                )

    def _spread_phases(self, source: int) -> list[int]:
        """Phase of a source per lane, in units of 1 / (2 num_lanes): evenly spread, in an order of its own."""
        order = keyed_permutation(self.num_lanes, derive_seed(self._seed, "phase", source))
        return [2 * place + 1 for place in order]


class _Drawing:
    """One window of one lane while it is drawn."""

    def __init__(
        self,
        epochs: Sequence[SourceEpochs],
        tree: WeightTree,
        phases: Sequence[Sequence[int]],
        num_lanes: int,
        state: LaneState,
        active: list[int],
    ):
        self._epochs = epochs
        self._tree = tree
        self._phases = phases
        self._num_lanes = num_lanes
        self._state = state
        self._active = active
        self._shares = state.shares
        self._counts = list(state.counts)
        self._places: list[_Place | None] = [None] * len(epochs)

    def draw(self, most: int) -> list[SampleRef]:
        """References in the order they are drawn, `most` of them unless the lane runs out."""
        refs: list[SampleRef] = []
        places = self._places
        while self._active and len(refs) < most:
            active = self._active
            mixture = self._mixture()
            for _ in range(most - len(refs)):
                number = mixture.draw()
                source = active[number]
                place = places[source]
                if place is None:
                    place = places[source] = _Place(self._epochs[source], source, self._state)
                refs.append(place.take())
                if place.used_up:
                    self._leave(source)
                    break
            else:
                for number, source in enumerate(active):
                    self._counts[source] = mixture.counts[number]
        return refs

    def after(self) -> LaneState:
        """The state after what was drawn."""
        cursors = tuple(
            cursor if place is None else (place.epoch, place.position)
            for place, cursor in zip(self._places, self._state.cursors)
        )
        return LaneState(self._state.lane, self._state.window + 1, False, self._shares, tuple(self._counts), cursors)

    def _mixture(self) -> Mixture:
        lane, active = self._state.lane, self._active
        return Mixture(
            [self._shares[source] for source in active],
            [self._phases[source][lane] for source in active],
            2 * self._num_lanes,
            [self._counts[source] for source in active],
        )

    def _leave(self, source: int) -> None:
        """A source has run out. The shares of those that stay change, so their counts start anew."""
        self._active = [other for other in self._active if other != source]
        self._shares = self._tree.without(self._shares, source, self._active)
        self._counts = [0] * len(self._counts)


class _Place:
    """Where a lane stands in a source while a window is drawn."""

    def __init__(self, epochs: SourceEpochs, source: int, state: LaneState):
        self._epochs = epochs
        self._source = source
        self._lane = state.lane
        self.epoch, self.position = state.cursors[source]
        self.used_up = False
        self._shift, self._stop = epochs.run(self._lane, self.epoch, self.position)

    def take(self) -> SampleRef:
        """The sample here; moves on to the next."""
        ref = SampleRef(self._source, self.epoch, self._shift + self.position)
        self.position += 1
        if self.position == self._stop:
            self.epoch, self.position = self._epochs.settled(self._lane, self.epoch, self.position)
            self.used_up = self._epochs.used_up(self.epoch)
            if not self.used_up:
                self._shift, self._stop = self._epochs.run(self._lane, self.epoch, self.position)
        return ref


def _count(value: Any) -> int:
    """A number of 0 or more. Raises TypeError or ValueError."""
    if type(value) is not int:
        raise TypeError(f"expected a number, got {value!r}")
    if value < 0:
        raise ValueError(f"expected a number of 0 or more, got {value}")
    return value
