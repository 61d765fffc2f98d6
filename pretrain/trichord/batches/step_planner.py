"""Planning whole steps: the rows of all lanes that a rank has to know, dealt to the ranks of its group.

lane readers -> rows of the step with their predicted cost -> deal -> this rank's rows, in micro-step order
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trichord.batches.dealing import RowLayout
from trichord.batches.lane_reader import LaneReader, LaneRow
from trichord.batches.loader_state import LaneCursor
from trichord.batches.windows import ItemLengths, LeftOut, PlannedSample, SamplePlanner
from trichord.shards.lanes import LanePlanner


@dataclass(frozen=True)
class PlannedStep:
    """One step of one rank, nothing decoded.

    rows: this rank's, in micro-step order. cursors: of all lanes that this rank plans, after the step. left_out and
    filtered: in the lanes whose state it keeps. per_shard: samples of its rows by URL of the shard. cost: predicted, of
    its rows; cost_undealt: of those it would have without dealing. imbalance: the most loaded rank of its group over
    the mean, as the rows lie and as they are dealt.
    """

    rows: tuple[list[PlannedSample], ...]
    cursors: dict[int, LaneCursor]
    left_out: tuple[LeftOut, ...]
    filtered: Counter[str]
    per_shard: Counter[str]
    cost: float
    cost_undealt: float
    imbalance: tuple[float, float]


class StepPlanner:
    """Plans step after step, for ever: lanes that are used up give empty rows."""

    def __init__(
        self,
        order: LanePlanner,
        planner: SamplePlanner,
        seed: int,
        layout: RowLayout,
        cursors: Mapping[int, LaneCursor],
        step: int,
    ) -> None:
        """cursors: of the lanes in `layout.planned_lanes`. step: steps given so far."""
        self._layout = layout
        self._rows_per_lane = planner.batches.rows_per_lane
        self._lengths = planner.lengths
        self._step = step
        self._readers = {lane: LaneReader(order, planner, seed, cursors[lane]) for lane in layout.planned_lanes}

    def steps(self) -> Iterator[PlannedStep]:
        while True:
            yield self._plan()

    def _plan(self) -> PlannedStep:
        rows: dict[int, LaneRow] = {}
        for lane, reader in self._readers.items():
            for number in range(self._rows_per_lane):
                rows[lane * self._rows_per_lane + number] = reader.next_row(self._step)
        self._step += 1
        layout = self._layout
        costs = {row: row_cost(rows[row].samples, self._lengths) for peers in layout.rows for row in peers}
        deal = layout.deal(costs)
        own = deal.rows[layout.place]
        kept = [rows[lane * self._rows_per_lane + n] for lane in layout.own_lanes for n in range(self._rows_per_lane)]
        return PlannedStep(
            rows=tuple(rows[row].samples for row in own),
            cursors={lane: reader.cursor for lane, reader in self._readers.items()},
            left_out=tuple(item for row in kept for item in row.left_out),
            filtered=sum((row.filtered for row in kept), Counter()),
            per_shard=Counter(sample.shard for row in own for sample in rows[row].samples),
            cost=sum(costs[row] for row in own),
            cost_undealt=sum(costs[row] for row in layout.rows[layout.place]),
            imbalance=(deal.before, deal.after),
        )


def row_cost(samples: list[PlannedSample], lengths: ItemLengths) -> float:
    """Predicted work of a row, in the unit of `lengths.cost`."""
    tokens = sum(sample.length for sample in samples)
    if lengths.cost is None:
        return float(tokens)
    images = sum(item.kind == "image" for sample in samples for item in sample.items)
    return lengths.cost(tokens, images, sum(sample.audio_samples for sample in samples))
