"""Where the loader stands: per lane a cursor of a few numbers, and the digests of what was planned and left out.

A rank's state holds the lanes it keeps. Merged over the ranks it is the state of the job, and says nothing of how many
ranks or workers there were.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trichord.core.errors import CheckpointError
from trichord.shards.lanes import LaneState, SampleRef

STATE_VERSION = 2
_EMPTY_CHAIN = "0" * 32
_TALLY_BITS = 128


@dataclass(frozen=True)
class LaneCursor:
    """Position of one lane between two steps.

    window: planner state at the start of the current window; carried: samples that the window before left over for it;
    row: rows of that window already given.
    chain: running digest of the references of every row so far, one link per row, empty rows too.
    exhausted: no sample is left in this lane, for good.
    """

    window: LaneState
    carried: tuple[SampleRef, ...] = ()
    row: int = 0
    chain: str = _EMPTY_CHAIN
    exhausted: bool = False

    def to_json(self) -> dict[str, Any]:
        fields = {**self.__dict__, "window": self.window.to_json(), "carried": [list(ref) for ref in self.carried]}
        return fields if self.carried else {k: v for k, v in fields.items() if k != "carried"}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> LaneCursor:
        carried = tuple(SampleRef(*map(int, ref)) for ref in fields.get("carried", ()))
        cursor = LaneCursor(**{**fields, "window": LaneState.from_json(fields["window"]), "carried": carried})
        bytes.fromhex(cursor.chain)
        return cursor


def extend_chain(chain: str, refs: Iterable[SampleRef]) -> str:
    """Next link of a digest chain: BLAKE2b over the previous link and the references as little-endian 64-bit ints."""
    return hashlib.blake2b(bytes.fromhex(chain) + _ref_bytes(refs), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Tally:
    """The samples left out so far, as a multiset: whoever finds one adds it, and tallies of ranks add up.

    count: how many. digest: sum of their hashes modulo 2^128, so no order is in it (Bellare and Micciancio 1997).
    """

    count: int = 0
    digest: int = 0

    def add(self, refs: Iterable[SampleRef]) -> Tally:
        return sum((Tally(1, _hash_of(ref)) for ref in refs), self)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.count + other.count, (self.digest + other.digest) % 2**_TALLY_BITS)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "digest": f"{self.digest:032x}"}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Tally:
        return Tally(int(fields["count"]), int(fields["digest"], 16))


@dataclass(frozen=True)
class LoaderState:
    """The loader after `step` steps. `data` names what the order depends on; a state fits no other data or packing."""

    step: int
    lanes: dict[int, LaneCursor]
    data: dict[str, Any]
    left_out: Tally = Tally()

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types. Once merged, the digest is in it for the reader's convenience."""
        fields: dict[str, Any] = {
            "version": STATE_VERSION,
            "step": self.step,
            "data": self.data,
            "lanes": {str(lane): self.lanes[lane].to_json() for lane in sorted(self.lanes)},
            "left_out": self.left_out.to_json(),
        }
        return fields | ({"digest": self.digest()} if self.is_merged else {})

    @staticmethod
    def from_json(fields: dict[str, Any]) -> LoaderState:
        """Raises CheckpointError when the fields are not a state of this version."""
        if fields.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the loader state has version {fields.get('version')!r}, this Trichord reads {STATE_VERSION}; "
                "resume with the version that wrote it"
            )
        try:
            lanes = {int(lane): LaneCursor.from_json(cursor) for lane, cursor in fields["lanes"].items()}
            return LoaderState(fields["step"], lanes, fields["data"], Tally.from_json(fields["left_out"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the loader state is damaged ({type(error).__name__}: {error}); use another checkpoint"
            ) from error

    @staticmethod
    def merge(states: Sequence[LoaderState]) -> LoaderState:
        """One state of all lanes from the states of all ranks.

        Raises:
            CheckpointError: the states are of different steps or data, share a lane, or leave one out.
        """
        first, lanes = states[0], {}
        for state in states:
            if state.step != first.step or state.data != first.data:
                raise CheckpointError(
                    f"loader states of different runs or steps cannot be merged: steps {first.step} and {state.step}"
                )
            shared = lanes.keys() & state.lanes.keys()
            if shared:
                raise CheckpointError(f"lanes {sorted(shared)[:5]} are in the loader states of two ranks")
            lanes |= state.lanes
        merged = LoaderState(first.step, lanes, first.data, sum((state.left_out for state in states), Tally()))
        merged._need_all_lanes()
        return merged

    @property
    def num_lanes(self) -> int:
        return self.data["num_lanes"]

    @property
    def is_merged(self) -> bool:
        """Whether every lane of the job is in here."""
        return self.lanes.keys() == set(range(self.num_lanes))

    @property
    def exhausted(self) -> bool:
        """Whether all lanes in here are used up: every further step would be empty rows."""
        return not self.open_lanes

    @property
    def open_lanes(self) -> int:
        """Lanes in here that are not used up."""
        return sum(not cursor.exhausted for cursor in self.lanes.values())

    def lanes_with(self, source: int, epochs: int | None) -> int:
        """Lanes in here from which samples of a source may still come. epochs: how often it is read, None: for ever."""
        if epochs is None:
            return len(self.lanes)
        return sum(
            cursor.window.cursors[source][0] < epochs or any(ref.source == source for ref in cursor.carried)
            for cursor in self.lanes.values()
        )

    @property
    def quarantined(self) -> int:
        """Samples left out so far: by the rank whose state this is, or merged, by all."""
        return self.left_out.count

    def digest(self) -> str:
        """Data order digest of a merged state: the planned references of all steps so far, hardware-independent."""
        self._need_all_lanes()
        chains = b"".join(bytes.fromhex(self.lanes[lane].chain) for lane in sorted(self.lanes))
        return hashlib.blake2b(chains, digest_size=16).hexdigest()

    def quarantine_digest(self) -> str:
        """Digest of the samples left out so far, of a merged state; hardware-independent too."""
        self._need_all_lanes()
        return f"{self.left_out.digest:032x}"

    def check_fits(self, data: dict[str, Any], advice: str = "restore the old value, or start a new run") -> None:
        """Raises CheckpointError, naming both values, when the state belongs to other data or another packing."""
        for key, now in data.items():
            then = self.data.get(key)
            if then != now:
                told = f"{key} {then!r}, now it is {now!r}"
                if key == "sources":
                    told = _told_sources(then, now) or told
                raise CheckpointError(
                    f"the loader state was made with {told}: the order of samples would not go on where it stopped; "
                    f"{advice}"
                )
        self._need_all_lanes()

    def _need_all_lanes(self) -> None:
        if not self.is_merged:
            missing = sorted(set(range(self.num_lanes)) - self.lanes.keys())
            raise CheckpointError(
                f"expected the loader state of all {self.num_lanes} lanes, lanes {missing[:5]} are missing; "
                "merge the states of all ranks with LoaderState.merge first"
            )


def _told_sources(then: Any, now: list[list[str]]) -> str:
    """Where the same sources hold other shards or leave out others: which; digests say nothing to a reader."""
    if not isinstance(then, list) or [source[0] for source in then] != [source[0] for source in now]:
        return ""
    parts = [
        f"other {what} of source {old[0]!r}"
        for old, new in zip(then, now)
        for what, place in (
            ("shards (or another order of them)", 1),
            ("filters, or another list of excluded samples,", 2),
        )
        if old[place] != new[place]
    ]
    return f"{' and '.join(parts)} than there are now"


def _ref_bytes(refs: Iterable[SampleRef]) -> bytes:
    numbers = [number for ref in refs for number in ref]
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _hash_of(ref: SampleRef) -> int:
    return int.from_bytes(hashlib.blake2b(_ref_bytes([ref]), digest_size=_TALLY_BITS // 8).digest(), "little")
