"""The blocks of a model: the layers of a transformer, the stages of a convolutional network. They are what activation
checkpointing recomputes and what torch.compile compiles."""

from __future__ import annotations

import re

from torch import nn

# How timm, transformers and our own towers call the list of their blocks.
_LIST_NAME = re.compile(r"layers|layer|blocks|stages|layer[1-9]")


def block_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each stack of `model` in the order of their forward pass; a block within a block is not listed."""
    lists: list[list[nn.Module]] = []
    _collect(model, lists)
    return lists


def _collect(module: nn.Module, lists: list[list[nn.Module]]) -> None:
    for name, child in module.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _LIST_NAME.fullmatch(name) and len(child):
            lists.append(list(child))
        else:
            _collect(child, lists)
