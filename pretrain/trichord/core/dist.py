"""Who am I among the processes: rank facts from the environment that torchrun sets. No torch."""

import os
from dataclasses import dataclass

from trichord.core.errors import ConfigError


@dataclass(frozen=True)
class RankFacts:
    """Position of this process in the job.

    rank, world_size: over all nodes; local_rank: on this node, the device index.
    """

    rank: int
    world_size: int
    local_rank: int


def rank_facts() -> RankFacts:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; a process started without them is rank 0 of 1.

    Raises:
        ConfigError: a variable is no integer, or the rank does not fit the world size.
    """
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        text = os.environ.get(name, default)
        if not text.isdigit():
            raise ConfigError(f"environment variable {name} must be an integer as torchrun sets it, got {text!r}")
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise ConfigError(
            f"environment says RANK={values['RANK']} of WORLD_SIZE={values['WORLD_SIZE']}; "
            "start the ranks with torchrun or trichord-launch, which set both"
        )
    return RankFacts(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])
