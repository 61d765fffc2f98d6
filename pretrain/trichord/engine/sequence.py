"""Which ranks share rows (sequence parallelism), and whether a model and a job can be divided so."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist

from trichord.core.dist import RankFacts
from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig, heads_refusal, ranks_refusal
from trichord.layers.sequence import SequenceGroup


class DataPlace(NamedTuple):
    """Where a rank stands among those that have rows of their own, and, in `place` of `size`, among those that share
    its rows. Groups are neighbouring ranks: their exchange is the dearest, and should stay inside a node."""

    rank: int
    world_size: int
    place: int
    size: int


def data_place(engine: EngineConfig, facts: RankFacts) -> DataPlace:
    """Raises ConfigError: the groups do not divide the job."""
    size = engine.sequence_parallel
    if (refusal := ranks_refusal(size, facts.world_size)) is not None:
        raise ConfigError(refusal)
    return DataPlace(facts.rank // size, facts.world_size // size, facts.rank % size, size)


def share_sequences(model: Any, engine: EngineConfig) -> None:
    """Make the groups and tell the model, a `Trichord`, its own. Called on all ranks.

    Raises:
        ConfigError: the trunk's heads cannot be divided.
    """
    size = engine.sequence_parallel
    if size == 1:
        return
    if (refusal := trunk_heads_refusal(model, size)) is not None:
        raise ConfigError(refusal)
    for first in range(0, dist.get_world_size(), size):
        group = dist.new_group(range(first, first + size))  # every rank takes part in making every group
        if isinstance(group, dist.ProcessGroup) and first <= dist.get_rank() < first + size:
            model.sequence = SequenceGroup(group)


def trunk_heads_refusal(model: Any, size: int) -> str | None:
    """Why the heads of the trunk that a model was built with cannot be shared so."""
    trunk = model.trunk.config
    return heads_refusal(size, trunk.num_attention_heads, trunk.num_key_value_heads)
