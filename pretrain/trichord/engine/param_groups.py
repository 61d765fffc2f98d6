"""Optimizer parameter groups: matrices are decayed, vectors are not, frozen parameters are in none."""

from __future__ import annotations

from typing import Any

from torch import nn

from trichord.engine.config import EngineConfig


def build_param_groups(model: nn.Module, engine: EngineConfig) -> list[dict[str, Any]]:
    """Groups for `torch.optim`: `decay` (2 and more axes) and `no_decay` (norm weights, biases, learned scalars).

    Must be called before the engine partitions the parameters: ZeRO-3 leaves them with empty shapes.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    decay, no_decay = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.dim() >= 2 else no_decay).append(parameter)
    if not decay and not no_decay:
        raise ValueError("the model has no trainable parameter: every room is frozen")
    groups = [
        {"name": "decay", "params": decay, "weight_decay": engine.weight_decay, "lr": engine.lr},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0, "lr": engine.lr},
    ]
    return [group for group in groups if group["params"]]
