"""Which rows of a step which rank computes, and in which micro-step.

    row r of a step belongs to lane r // rows_per_lane and, undealt, to rank r % world_size
    rank's j-th row is row j % micro_rows of micro-batch j // micro_rows

With `deal_ranks` above 1, that many neighbouring ranks share out the rows of all of them by predicted cost. Only who
computes a row changes: which rows a step has, and the digest over them, do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trichord.batches.config import BatchesConfig


@dataclass(frozen=True)
class Deal:
    """The rows of one step of a group of ranks. rows: row numbers of each rank, in micro-step order.

    before, after: the most loaded rank's cost over the mean of the group, undealt and as dealt; 1 is balance.
    """

    rows: tuple[tuple[int, ...], ...]
    before: float
    after: float


class RowLayout:
    """What follows from (rows per step, world size, micro_rows, deal_ranks, rank) alone."""

    def __init__(self, batches: BatchesConfig, rank: int, world_size: int) -> None:
        self._batches = batches
        self._world_size = world_size
        self.micro_rows = batches.micro_rows
        self.micro_steps = -(-batches.rows_per_step // (world_size * batches.micro_rows))
        first = rank // batches.deal_ranks * batches.deal_ranks
        self.ranks = tuple(range(first, min(first + batches.deal_ranks, world_size)))
        """The group that shares out its rows."""
        self.place = rank - first
        """Of this rank in its group."""
        self.rows = tuple(tuple(range(peer, batches.rows_per_step, world_size)) for peer in self.ranks)
        """Row numbers of each rank of the group, undealt."""
        self.own_lanes = [lane for lane in range(batches.num_lanes) if self._keeper(lane) == rank]
        """Lanes whose state this rank keeps; each lane has one keeper in the job."""
        self.planned_lanes = sorted({row // batches.rows_per_lane for rows in self.rows for row in rows})
        """Lanes that this rank has to plan to know its rows."""

    def _keeper(self, lane: int) -> int:
        return lane * self._batches.rows_per_lane % self._world_size

    def deal(self, costs: dict[int, float]) -> Deal:
        """Share out the rows of a step. costs: of each row of the group, by row number."""
        before = _imbalance([sum(costs[row] for row in rows) for rows in self.rows])
        if len(self.ranks) == 1:
            return Deal(self.rows, before, before)
        dealt = _share_out(costs, len(self.ranks), self.micro_steps * self.micro_rows)
        return Deal(dealt, before, _imbalance([sum(costs[row] for row in rows) for rows in dealt]))


def _share_out(costs: dict[int, float], num_ranks: int, capacity: int) -> tuple[tuple[int, ...], ...]:
    """Longest processing time first (Graham 1969): each row, dearest first, to the least loaded rank with room.

    A rank's rows are in falling order of cost, so that the same micro-step is about as dear on all ranks: under ZeRO
    they wait for each other in each one.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for row in sorted(costs, key=lambda row: (-costs[row], row)):
        rank = min(
            (r for r in range(num_ranks) if len(dealt[r]) < capacity), key=lambda r: (loads[r], len(dealt[r]), r)
        )
        dealt[rank].append(row)
        loads[rank] += costs[row]
    return tuple(tuple(rows) for rows in dealt)


def _imbalance(loads: Sequence[float]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0
