"""Reading one lane: window after window is planned, and one row is given per step.

    cursor (start of window, row)  ->  plan the window  ->  row 0, row 1, ...  ->  cursor (start of next window, 0)

Everything is a function of the cursor, so a lane goes on in any process that is given it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trichord.batches.loader_state import LaneCursor, extend_chain
from trichord.batches.rows import DecodedItems, RowArrays, build_row
from trichord.batches.windows import LeftOut, PlannedSample, SamplePlanner, WindowPlan
from trichord.core.errors import CheckpointError
from trichord.samples.sample import AugmentKey, decode_items
from trichord.shards.lanes import LanePlanner, LaneState
from trichord.shards.quarantine import BadSample, QuarantineRecord


@dataclass(frozen=True)
class LaneStep:
    """What one lane gives in one step: the row, the cursor after it, and the samples found bad in it."""

    lane: int
    row: RowArrays
    cursor: LaneCursor
    records: tuple[QuarantineRecord, ...]


class LaneReader:
    """Gives the rows of one lane, planned but not decoded."""

    def __init__(self, order: LanePlanner, planner: SamplePlanner, seed: int, cursor: LaneCursor) -> None:
        self._order = order
        self._planner = planner
        self._seed = seed
        self.cursor = cursor
        self._plan: WindowPlan | None = None
        self._next_window: LaneState | None = None

    def next_row(self) -> tuple[list[PlannedSample], list[LeftOut]]:
        """The next row's samples, and what was left out while planning for it.

        No samples: the lane is used up (`cursor.exhausted`), or not one sample of the window is good. Such a window
        costs one empty row, so that the step is taken and the job as a whole can judge how much of its data is bad.
        Advances `cursor` past the row. A window that is resumed in its middle says nothing again of what it left out.
        """
        left_out: list[LeftOut] = []
        while self._plan is None or self.cursor.row >= len(self._plan.rows):
            if self._plan is not None:
                self._close_window()
            self.cursor = replace(self.cursor, window=self._order.opened(self.cursor.window, 0))
            refs, after = self._order.next_window(self.cursor.window, 0)
            if not refs:
                self.cursor = replace(self.cursor, exhausted=True, chain=extend_chain(self.cursor.chain, []))
                return [], left_out
            window = self.cursor.window
            self._plan = self._planner.plan_window(refs, self._seed, window.lane, window.window)
            self._next_window = after
            if self.cursor.row == 0:
                left_out += self._plan.left_out
                self.cursor = self.cursor.quarantine([item.ref for item in self._plan.left_out])
            elif self.cursor.row >= len(self._plan.rows):
                raise CheckpointError(
                    f"lane {window.lane} stopped after row {self.cursor.row} of window {window.window}, which has "
                    f"{len(self._plan.rows)} rows now; the data, the tokenizer or the model's lengths have changed"
                )
            if not self._plan.rows:
                self._close_window()
                self.cursor = replace(self.cursor, chain=extend_chain(self.cursor.chain, []))
                return [], left_out
        row = self._plan.rows[self.cursor.row]
        refs = [sample.ref for sample in row]
        self.cursor = replace(self.cursor, row=self.cursor.row + 1, chain=extend_chain(self.cursor.chain, refs))
        if self.cursor.row == len(self._plan.rows):
            self._close_window()
        return row, left_out

    def _close_window(self) -> None:
        """Move to the start of the next window, so that a resume plans no window that is already over."""
        assert self._next_window is not None
        used_up = self._order.exhausted(self._next_window)
        self.cursor = replace(self.cursor, window=self._next_window, row=0, exhausted=used_up)
        self._plan = None


class LaneGroup:
    """Several lanes read and decoded in step: those of a rank, or of one of its workers."""

    def __init__(
        self,
        order: LanePlanner,
        planner: SamplePlanner,
        seed: int,
        augment: bool,
        cursors: dict[int, LaneCursor],
        step: int,
    ) -> None:
        """step: steps given so far; the records of the next one carry step + 1."""
        self._planner = planner
        self._seed = seed
        self._augment = augment
        self._step = step
        self._readers = {lane: LaneReader(order, planner, seed, cursor) for lane, cursor in cursors.items()}

    def steps(self) -> Iterator[list[LaneStep]]:
        """One row of every lane per step, for ever."""
        while True:
            self._step += 1
            yield [self._read(lane, reader) for lane, reader in self._readers.items()]

    def _read(self, lane: int, reader: LaneReader) -> LaneStep:
        planned, left_out = reader.next_row()
        decoded, bad = self.decode(planned)
        reader.cursor = reader.cursor.quarantine([item.ref for item in bad])
        planner = self._planner
        row = build_row(planned, decoded, planner.tokenizer, planner.batches, planner.samples.image.size)
        records = tuple(replace(item.record, step=self._step) for item in (*left_out, *bad))
        return LaneStep(lane, row, reader.cursor, records)

    def decode(self, planned: Sequence[PlannedSample]) -> tuple[list[DecodedItems | None], list[LeftOut]]:
        """Items of each sample, None where the content turns out bad, and what is said about those."""
        decoded: list[DecodedItems | None] = []
        bad: list[LeftOut] = []
        for sample in planned:
            try:
                decoded.append(self._decode(sample))
            except BadSample as error:
                decoded.append(None)
                bad.append(self._planner.left_out(sample.ref, error))
        return decoded, bad

    def _decode(self, sample: PlannedSample) -> DecodedItems:
        planner, ref = self._planner, sample.ref
        key = AugmentKey(self._seed, planner.tables[ref.source].name, ref.epoch, ref.sample) if self._augment else None
        return DecodedItems(*decode_items(sample.entry, planner.samples, planner.max_member_bytes, key))
