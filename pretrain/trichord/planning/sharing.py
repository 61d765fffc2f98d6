"""Sequence parallelism in a plan: one rank's part of the model over shapes alone, and what its group exchanges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trichord.core.dist import RankFacts
from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.engine.sequence import check_heads, data_place
from trichord.layers.sequence import SequenceGroup
from trichord.planning.comms import Collective
from trichord.planning.recomputation import moves_again

_WHAT = {"attention": "tokens for heads", "features": "features of items"}


class ShapeGroup(SequenceGroup):
    """The last rank of a group of `size`, alone: nothing is sent, sizes are right. sent: is told the bytes that a rank
    puts into each exchange, on average.

    Items are shared out so that the last rank never has fewer than another."""

    def __init__(self, size: int, sent: Callable[[float], None]) -> None:
        self.place, self.size, self._sent = size - 1, size, sent

    def exchange(self, rows: Tensor, have: Sequence[int], need: Sequence[int]) -> Tensor:
        each = rows[:1].numel() if len(rows) else rows.new_empty(1, *rows.shape[1:]).numel()
        self._sent(have[-1] * each * rows.element_size() / self.size)
        return _Sized.apply(rows, need[self.place + 1] - need[self.place])

    def _swap(self, parts: Tensor) -> Tensor:
        self._sent(parts.numel() * parts.element_size())
        return _Sized.apply(parts, len(parts))


class _Sized(torch.autograd.Function):
    """So many rows like those given; keeps nothing for the backward pass, as an exchange does not."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int) -> Tensor:
        return rows.new_empty(number, *rows.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise NotImplementedError("a plan runs forward only")


def check_sharing(model: Any, engine: EngineConfig, micro_tokens: int, ranks: int) -> None:
    """Raises ConfigError: groups of `engine.sequence_parallel` do not fit the job, the tokens of a micro-step or the
    trunk's heads."""
    size = engine.sequence_parallel
    data_place(engine, RankFacts(rank=0, world_size=ranks, local_rank=0))
    if size == 1:
        return
    if model.trunk is None:
        raise ConfigError(f"engine.sequence_parallel {size} shares out the trunk's tokens; this model has no trunk")
    if micro_tokens % size:
        raise ConfigError(
            f"engine.sequence_parallel {size} does not divide the {micro_tokens} tokens of a micro-step "
            "(batches.micro_rows * batches.row_tokens); round batches.row_tokens"
        )
    check_heads(model, size)


def exchanges(
    sent: Mapping[str, float], messages: Mapping[str, int], engine: EngineConfig, accumulation: int
) -> Iterator[Collective]:
    """Of one step. sent, messages: of the forward pass of a micro-step; what it sends comes back as gradients. Blocks
    that activation checkpointing runs again send again."""
    again = moves_again(engine)
    for kind, size in sent.items():
        passes = accumulation * (2 + again * (kind == "attention"))
        number = round(passes * messages[kind])
        yield Collective(_WHAT[kind], "all_to_all", round(passes * size), number, ranks=engine.sequence_parallel)
