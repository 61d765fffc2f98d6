"""Where the loader stands: per lane a cursor of a few numbers, and the digests of what was planned and left out.

A rank's state holds its own lanes. Merged over the ranks it is the state of the job, and says nothing of how many
ranks or workers there were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trichord.core.errors import CheckpointError
from trichord.shards.lanes import LaneState, SampleRef

STATE_VERSION = 1
_EMPTY_CHAIN = "0" * 32


@dataclass(frozen=True)
class LaneCursor:
    """Position of one lane between two steps.

    window: planner state at the start of the current window; row: rows of that window already given.
    chain: running digest of the references of every row so far, one link per step, empty rows too.
    quarantined, quarantine_chain: count and running digest of the samples left out so far.
    exhausted: no sample is left in this lane, for good.
    """

    window: LaneState
    row: int = 0
    chain: str = _EMPTY_CHAIN
    quarantined: int = 0
    quarantine_chain: str = _EMPTY_CHAIN
    exhausted: bool = False

    def quarantine(self, refs: Sequence[SampleRef]) -> LaneCursor:
        """The cursor after these samples were left out, in this order."""
        chain = self.quarantine_chain
        for ref in refs:
            chain = extend_chain(chain, [ref])
        return replace(self, quarantined=self.quarantined + len(refs), quarantine_chain=chain)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "window": self.window.to_json()}

    @staticmethod
    def from_json(fields: dict[str, Any]) -> LaneCursor:
        return LaneCursor(**{**fields, "window": LaneState.from_json(fields["window"])})


def extend_chain(chain: str, refs: Iterable[SampleRef]) -> str:
    """Next link of a digest chain: BLAKE2b over the previous link and the references as little-endian 64-bit ints."""
    numbers = (number for ref in refs for number in ref)
    content = b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)
    return hashlib.blake2b(bytes.fromhex(chain) + content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class LoaderState:
    """The loader after `step` steps. `data` names what the order depends on; a state fits no other data or packing."""

    step: int
    lanes: dict[int, LaneCursor]
    data: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types. `quarantined` and, once merged, the digests are in it for the reader's convenience."""
        fields: dict[str, Any] = {
            "version": STATE_VERSION,
            "step": self.step,
            "data": self.data,
            "lanes": {str(lane): self.lanes[lane].to_json() for lane in sorted(self.lanes)},
            "quarantined": self.quarantined,
        }
        if self.is_merged:
            fields |= {"digest": self.digest(), "quarantine_digest": self.quarantine_digest()}
        return fields

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
            return LoaderState(fields["step"], lanes, fields["data"])
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
        merged = LoaderState(first.step, lanes, first.data)
        merged._need_all_lanes()
        return merged

    @property
    def num_lanes(self) -> int:
        return self.data["rows_per_step"]

    @property
    def is_merged(self) -> bool:
        """Whether every lane of the job is in here."""
        return self.lanes.keys() == set(range(self.num_lanes))

    @property
    def exhausted(self) -> bool:
        """Whether all lanes in here are used up: every further step would be empty rows."""
        return all(cursor.exhausted for cursor in self.lanes.values())

    @property
    def quarantined(self) -> int:
        """Samples left out so far, in the lanes in here."""
        return sum(cursor.quarantined for cursor in self.lanes.values())

    def digest(self) -> str:
        """Data order digest of a merged state: the planned references of all steps so far, hardware-independent."""
        self._need_all_lanes()
        return _merged_digest(self.lanes[lane].chain for lane in sorted(self.lanes))

    def quarantine_digest(self) -> str:
        """The same over the samples left out."""
        self._need_all_lanes()
        return _merged_digest(self.lanes[lane].quarantine_chain for lane in sorted(self.lanes))

    def check_fits(self, data: dict[str, Any]) -> None:
        """Raises CheckpointError, naming both values, when the state belongs to other data or another packing."""
        for key, now in data.items():
            then = self.data.get(key)
            if then != now:
                raise CheckpointError(
                    f"the loader state was made with {key} {then!r}, now it is {now!r}: the order of samples would not "
                    "go on where it stopped; restore the old value, or start a new run"
                )
        self._need_all_lanes()

    def _need_all_lanes(self) -> None:
        if not self.is_merged:
            missing = sorted(set(range(self.num_lanes)) - self.lanes.keys())
            raise CheckpointError(
                f"expected the loader state of all {self.num_lanes} lanes, lanes {missing[:5]} are missing; "
                "merge the states of all ranks with LoaderState.merge first"
            )


def _merged_digest(chains: Iterable[str]) -> str:
    return hashlib.blake2b(b"".join(bytes.fromhex(chain) for chain in chains), digest_size=16).hexdigest()
