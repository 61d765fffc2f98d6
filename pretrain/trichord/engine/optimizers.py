"""The optimizers a run can choose from, all torch's own: DeepSpeed partitions their states, whatever they are."""

from __future__ import annotations

from typing import Any

import torch

from trichord.engine.config import EngineConfig


def build_optimizer(groups: list[dict[str, Any]], engine: EngineConfig, device: torch.device) -> torch.optim.Optimizer:
    """`engine.optimizer` over the groups of `build_param_groups`.

    On a GPU Adam is fused into one kernel, unless its states live in host memory.
    """
    fused = True if device.type == "cuda" and engine.offload == "none" else None
    if engine.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=engine.lr, betas=engine.betas, eps=engine.eps, fused=fused)
    if engine.optimizer == "adam":
        return torch.optim.Adam(groups, lr=engine.lr, betas=engine.betas, eps=engine.eps, fused=fused)
    if engine.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=engine.lr, momentum=engine.momentum)
    return torch.optim.RMSprop(groups, lr=engine.lr, alpha=engine.betas[1], eps=engine.eps, momentum=engine.momentum)
