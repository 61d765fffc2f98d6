"""What the engine does to the blocks of a model before it is handed to DeepSpeed."""

from __future__ import annotations

from typing import Any

from torch import nn

from trichord.core.dist import rank_facts
from trichord.engine.build import pick_device
from trichord.engine.config import EngineConfig
from trichord.layers.blocks import block_lists
from trichord.layers.compiled import compile_blocks, require_compiler
from trichord.layers.recompute import recompute_blocks


def prepare_blocks(model: nn.Module, engine: EngineConfig) -> None:
    """Activation checkpointing and compilation, in every stack of the model: towers and trunk.

    Raises:
        ConfigError: this machine cannot compile.
    """
    if engine.compile:
        require_compiler(pick_device(rank_facts()))
    mode, every = engine.activation_checkpointing, engine.checkpoint_every_blocks
    # What ZeRO-3 does inside of a block would break its graph at each module, and is no part of what selective
    # recomputation may find computed differently: there it gathers a block as one.
    as_one = engine.zero_stage == 3 and (engine.compile or mode == "selective")
    for blocks in block_lists(model):
        if as_one:
            _gather_as_one(blocks)
        if engine.compile:
            compile_blocks(blocks, mode, every)
        else:
            recompute_blocks(blocks, mode, every, inside=as_one)


def _gather_as_one(blocks: list[Any]) -> None:
    """Have ZeRO-3 gather all parameters of a block before it is called, forwards and backwards."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks:
        set_z3_leaf_module(block, True)
