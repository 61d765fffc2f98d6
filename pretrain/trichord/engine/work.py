"""How much arithmetic the steps of this rank were: FLOPs needed and FLOPs executed, from host facts of the batches."""

from __future__ import annotations

from collections.abc import Sequence

from trichord.batches.packed_batch import PackedBatch
from trichord.core.log import get_logger
from trichord.engine.config import EngineConfig
from trichord.fusion.counts import Counts, count_contrasts, executed_counts, useful_counts
from trichord.fusion.flops import Piece, flop_table, step_flops
from trichord.fusion.model import Trichord
from trichord.objectives.config import ContrastiveConfig

log = get_logger(__name__)


class WorkMeter:
    """Adds up what the micro-batches of this rank hold, and turns it into FLOPs when it is read.

    Needed: forward and backward of what carries information, no slack, no padding. Executed: everything that runs, what
    the backward pass computes again included.
    """

    def __init__(
        self,
        model: Trichord,
        engine: EngineConfig,
        contrastive: ContrastiveConfig | None,
        *,
        slots: int,
        micro_batches: int,
        world_size: int,
    ) -> None:
        """slots: sample slots of this rank per step; micro_batches: per step, on each rank."""
        self._model = model
        self._engine = engine
        self._contrasts = _contrasts(contrastive, slots, world_size)
        self._towers_twice = contrastive is not None and micro_batches > 1
        self._useful = self._executed = Counts()
        self._table: list[Piece] | None = None
        self._learning: tuple[bool, ...] = ()
        self._broken = False

    def add(self, batches: Sequence[PackedBatch]) -> None:
        """Take in one step. Reads no tensor."""
        if self._broken:
            return
        useful = (_part(batch, useful_counts(batch, self._model)) for batch in batches)
        self._useful = sum(useful, self._useful + Counts(contrasts=self._contrasts))
        executed = (_part(batch, executed_counts(batch, self._model)) for batch in batches)
        self._executed = sum(executed, self._executed + Counts(contrasts=self._contrasts))

    def read(self) -> tuple[float, float]:
        """(needed, executed) FLOPs of this rank since the last reading; zeros for a model that cannot be counted."""
        useful, executed = self._useful, self._executed
        self._useful = self._executed = Counts()
        try:
            table = self._current_table()
        except Exception as error:  # any timm model may come: a figure about the run must not end it
            if not self._broken:
                log.warning("the FLOPs of this model cannot be counted (%s): no speed/flops_per_s, no MFU", error)
            self._broken = True
            return 0.0, 0.0
        needed = sum(flops.model for flops in step_flops(table, useful).values())
        again = {"blocks_again": blocks_again(self._engine), "towers_twice": self._towers_twice}
        return needed, sum(flops.hardware for flops in step_flops(table, executed, **again).values())

    def _current_table(self) -> list[Piece]:
        """The model's table, anew where rooms were frozen or thawed."""
        learning = tuple(any(p.requires_grad for p in room.parameters()) for room in self._model.children())
        if self._table is None or learning != self._learning:
            self._table, self._learning = flop_table(self._model), learning
        return self._table


def _part(batch: PackedBatch, counts: Counts) -> Counts:
    """This rank's part of what a batch asks for; that of all ranks that share it is the whole."""
    return counts * (1 / batch.own.size) if batch.part is not None else counts


def blocks_again(engine: EngineConfig) -> float:
    """Share of the blocks' forward pass that activation checkpointing runs again; selective keeps what counts here."""
    return 1.0 / engine.checkpoint_every_blocks if engine.activation_checkpointing == "full" else 0.0


def _contrasts(contrastive: ContrastiveConfig | None, slots: int, world_size: int) -> int:
    if contrastive is None:
        return 0
    directions = 1 if contrastive.kind == "sigmoid" else 2
    return count_contrasts(slots, world_size, len(contrastive.pairs), directions)
