"""Reading one lane: window after window is planned, and its rows are given one by one.

    cursor (start of window, row)  ->  plan the window  ->  row 0, row 1, ...  ->  cursor (start of next window, 0)

Everything is a function of the cursor, so a lane goes on in any process that is given it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from trichord.batches.loader_state import LaneCursor, extend_chain
from trichord.batches.windows import LeftOut, PlannedSample, SamplePlanner, WindowPlan
from trichord.core.errors import CheckpointError
from trichord.core.phase import set_phase
from trichord.core.seed import derive_seed
from trichord.shards.lanes import LanePlanner, LaneState


@dataclass(frozen=True)
class LaneRow:
    """A row of a lane, planned but not decoded; and what was left out while planning for it: bad samples, and how many
    each filter left out. A window says it with its first row, and not again when it is resumed in its middle."""

    samples: list[PlannedSample]
    left_out: list[LeftOut] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)


class LaneReader:
    """Gives the rows of one lane."""

    def __init__(self, order: LanePlanner, planner: SamplePlanner, seed: int, cursor: LaneCursor) -> None:
        self._order = order
        self._planner = planner
        self._seed = seed
        self.cursor = cursor
        self._plan: WindowPlan | None = None
        self._next_window: LaneState | None = None

    def next_row(self, step: int) -> LaneRow:
        """The next row, of step number `step` (0 is the first). Advances `cursor` past it.

        No samples: the lane is used up (`cursor.exhausted`), or not one sample of the window is left. Such a window
        costs one empty row, so that the step is taken and the job as a whole can judge how much of its data is bad.
        """
        if self._plan is None and not self._open_window(step):
            self.cursor = replace(self.cursor, exhausted=True, chain=extend_chain(self.cursor.chain, []))
            return LaneRow([])
        plan = self._plan
        assert plan is not None
        first = self.cursor.row == 0
        samples = plan.rows[self.cursor.row] if plan.rows else []
        chain = extend_chain(self.cursor.chain, [sample.ref for sample in samples])
        self.cursor = replace(self.cursor, row=self.cursor.row + 1, chain=chain)
        if self.cursor.row >= len(plan.rows):
            self._close_window()
        return LaneRow(samples, plan.left_out, plan.filtered) if first else LaneRow(samples)

    def _open_window(self, step: int) -> bool:
        """Plan the window that the cursor stands in; whether there is one."""
        if self._order.exhausted(self.cursor.window) and not self.cursor.carried:
            return False
        # Opened, it stays the same window whatever the weights are when the run is resumed in its middle.
        window = self._order.opened(self.cursor.window, step)
        refs, after = self._order.next_window(window, step)
        self.cursor = replace(self.cursor, window=window)
        set_phase("plan", lane=window.lane, window=window.window)
        self._plan = self._planner.plan_window(
            refs,
            carried=self.cursor.carried,
            last=self._order.exhausted(after),
            order_seed=derive_seed(self._seed, "rows", window.lane, window.window),
        )
        self._next_window = after
        if self.cursor.row and self.cursor.row >= len(self._plan.rows):
            raise CheckpointError(
                f"lane {window.lane} stopped after row {self.cursor.row} of window {window.window}, which has "
                f"{len(self._plan.rows)} rows now; the data, the tokenizer or the model's lengths have changed"
            )
        return True

    def _close_window(self) -> None:
        """Move to the start of the next window, so that a resume plans no window that is already over."""
        assert self._next_window is not None
        assert self._plan is not None
        carried = self._plan.carried
        used_up = self._order.exhausted(self._next_window) and not carried
        self.cursor = replace(self.cursor, window=self._next_window, carried=carried, row=0, exhausted=used_up)
        self._plan = None
