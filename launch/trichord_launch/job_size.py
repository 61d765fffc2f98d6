"""Whether a run can use that many ranks: groups of ranks that share rows, and a row of each step for every group."""

from __future__ import annotations

from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.engine.config import ranks_refusal


def require_groups(config: RunConfig, ranks: int) -> None:
    """Refuse what every rank would refuse, an import of torch later.

    Raises:
        ConfigError: `engine.sequence_parallel` does not divide the ranks.
    """
    if (refusal := ranks_refusal(config.engine.sequence_parallel, ranks)) is not None:
        raise ConfigError(f"{config.run.name}: {refusal}")


def size_warnings(config: RunConfig, ranks: int, ranks_per_node: int) -> list[str]:
    """What works, but not as well as it could: groups over two nodes, ranks without a row. ranks: divided by groups."""
    size, rows = config.engine.sequence_parallel, config.batches.rows_per_step
    said = []
    if ranks > ranks_per_node and ranks_per_node % size:
        said.append(
            f"engine.sequence_parallel {size} does not divide the {ranks_per_node} ranks of a node, so some groups "
            "exchange every layer's tokens over the network; take a divisor of them"
        )
    if ranks > rows * size:
        shared = f" for groups of {size} ranks (engine.sequence_parallel)" if size > 1 else ""
        said.append(
            f"{config.run.name} has batches.rows_per_step {rows}{shared}, so {ranks - rows * size} of {ranks} ranks "
            "would idle; take fewer ranks, or more rows per step"
        )
    return said
