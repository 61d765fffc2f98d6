"""Kinds of activation checkpointing, as the planner takes them from the config and tries them."""

from __future__ import annotations

from typing import get_args

from trichord.engine.config import EngineConfig
from trichord.engine.work import blocks_again
from trichord.layers.recompute import Recompute

MODES: tuple[Recompute, ...] = get_args(Recompute)


def products_again(engine: EngineConfig) -> float:
    """Share of the blocks' products that the backward pass runs again."""
    return blocks_again(engine)


def moves_again(engine: EngineConfig) -> float:
    """Share of the blocks' elementwise work that it runs again: `selective` keeps products, not the rest."""
    return 0.0 if engine.activation_checkpointing == "none" else 1.0 / engine.checkpoint_every_blocks
