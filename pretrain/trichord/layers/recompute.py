"""Activation checkpointing: blocks whose activations are computed again in the backward pass instead of being kept.

Always non-reentrant: the reentrant kind drops gradients of inputs passed by keyword and calls hooks in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "full", "selective"]

# What `selective` keeps: results of matrix products, convolutions and attention, the dear part of a block. The rest
# (norms, activations, rotations, sums) is most of the memory and little of the time.
KEPT_OPS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::convolution",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "trichord::attention_forward",
        "trichord::gated_cross_attention_forward",
    }
)


def recompute_blocks(blocks: Sequence[nn.Module], mode: Recompute, every: int = 1, inside: bool = False) -> None:
    """Recompute the first of every `every` blocks in training.

    From outside of their forward: in the recomputation the hooks of a block run too, by which ZeRO-3 gathers what
    belongs to it. `inside`: the forward alone, for blocks whose parameters are there whenever they are needed.
    """
    if mode == "none":
        return
    for block in chosen_blocks(blocks, every):
        if inside:
            block.forward = checkpointed(block.forward, mode)
        else:
            block.__class__ = _recomputed_class(type(block), mode)


def chosen_blocks(blocks: Sequence[nn.Module], every: int) -> list[nn.Module]:
    return list(blocks[::every])


def checkpointed(function: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """`function`, recomputed in its backward pass; without gradients it is called as it is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if mode == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _policy)
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return run


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation._schema.name in KEPT_OPS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@cache
def _recomputed_class(old: type, mode: Recompute) -> type:
    """A subclass of the block's own class and of the same name, which recording of hidden states and wrapping policies
    go by. Modules and Parameters stay where they are."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpointed(partial(old.__call__, self), mode)(*args, **kwargs)

    return type(old.__name__, (old,), {"__module__": old.__module__, "__call__": call})
