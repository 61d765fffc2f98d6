"""torch.compile block by block: one small graph for all blocks of a stack, where the whole model would be one graph
per shape, minutes to compile, and broken wherever the model reads the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from trichord.layers.recompute import Recompute, checkpointed, chosen_blocks

BACKEND = "inductor"
_GRAPHS_PER_BLOCK = 8  # with and without gradients, one item and several, each once more with other types


def compile_blocks(blocks: Sequence[nn.Module], recompute: Recompute = "none", every: int = 1) -> None:
    """Compile the forward of each block, with recomputation inside of the graph, for any number and length of items.

    The forward, not the call: hooks stay outside, among them those by which ZeRO-3 gathers a block's parameters.
    """
    again = {id(block) for block in chosen_blocks(blocks, every)} if recompute != "none" else set()
    # All blocks share the code, so they share its number of graphs; beyond it torch runs uncompiled without an error.
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _GRAPHS_PER_BLOCK * len(blocks))
    for block in blocks:
        forward = checkpointed(block.forward, recompute) if id(block) in again else block.forward
        block.forward = torch.compile(forward, backend=BACKEND, dynamic=True)
