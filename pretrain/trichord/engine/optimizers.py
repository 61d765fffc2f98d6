"""The optimizers a run can choose from: DeepSpeed partitions their states, whatever they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trichord.core.errors import ConfigError
from trichord.core.log import get_logger
from trichord.engine.compact_moments import Coded, CompactAdam, unpacked
from trichord.engine.config import EngineConfig
from trichord.engine.muon import Muon

log = get_logger(__name__)


def build_optimizer(groups: list[dict[str, Any]], engine: EngineConfig, device: torch.device) -> torch.optim.Optimizer:
    """`engine.optimizer` over the groups of `build_param_groups`.

    On a GPU Adam is fused into one kernel; where its states live in host memory it is DeepSpeed's, made for that.

    Raises:
        ConfigError: DeepSpeed's CPU Adam cannot be built on this machine.
    """
    offloaded = engine.offload != "none"
    if offloaded and engine.offload_optimizer == "deepspeed" and engine.optimizer in ("adamw", "adam"):
        return _deepspeed_cpu_adam(groups, engine)
    fused = True if device.type == "cuda" and not offloaded else None
    if engine.optimizer == "adamw_8bit" or engine.optimizer_states == "bf16":
        options = {"lr": engine.lr, "betas": engine.betas, "eps": engine.eps, "fused": bool(fused)}
        store = "8bit" if engine.optimizer == "adamw_8bit" else "bf16"
        return CompactAdam(groups, decoupled=engine.optimizer != "adam", store=store, **options)
    if engine.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=engine.lr, betas=engine.betas, eps=engine.eps, fused=fused)
    if engine.optimizer == "adam":
        return torch.optim.Adam(groups, lr=engine.lr, betas=engine.betas, eps=engine.eps, fused=fused)
    if engine.optimizer == "muon":
        dtype = torch.float32 if engine.precision == "fp32" else torch.bfloat16
        adamw = {"lr": engine.lr, "betas": engine.betas, "eps": engine.eps, "fused": fused}
        muon = {"momentum": engine.muon.momentum, "scale": engine.muon.scale}
        return Muon(groups, **muon, dtype=dtype, device=device, adamw=adamw)
    if engine.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=engine.lr, momentum=engine.momentum)
    return torch.optim.RMSprop(groups, lr=engine.lr, alpha=engine.betas[1], eps=engine.eps, momentum=engine.momentum)


def empty_state(optimizer: torch.optim.Optimizer, master: Tensor, kinds: Iterable[str], step: int) -> dict[str, Any]:
    """The state of a master after `step` updates: fp32 zeros of its shape for each kind, to be filled, and the counter.
    When they are filled, `pack_state` brings them into the form that the optimizer keeps."""
    state: dict[str, Any] = {kind: torch.zeros_like(master.data) for kind in kinds}
    return {**state, **_counter(optimizer, master, state, step)} if state else {}


def pack_state(optimizer: torch.optim.Optimizer, master: Tensor) -> None:
    """After a state of `empty_state` was filled."""
    if isinstance(optimizer, CompactAdam):
        optimizer.pack(master)


def state_tensors(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Kind -> the flat state of a master, without counters: the live tensor, or fp32 that was decoded from 8 bits."""
    state = optimizer.state.get(master, {})
    numel = master.numel()
    moments = {kind: value for kind, value in state.items() if kind != "step" and isinstance(value, (Tensor, Coded))}
    found = {kind: unpacked(value, numel) for kind, value in moments.items()}
    return {kind: tensor for kind, tensor in found.items() if tensor.numel() == numel}


def _counter(
    optimizer: torch.optim.Optimizer, master: Tensor, kinds: Iterable[str], step: int
) -> dict[str, Tensor | int]:
    """What counts the updates of a master; empty for SGD and Muon's matrices, which count none."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    if isinstance(optimizer, torch.optim.SGD) or (isinstance(optimizer, Muon) and set(kinds) == {"momentum_buffer"}):
        return {}
    if isinstance(optimizer, DeepSpeedCPUAdam):
        return {"step": step}
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return {"step": torch.tensor(float(step), dtype=torch.float32, device=master.device if on_device else "cpu")}


def _deepspeed_cpu_adam(groups: list[dict[str, Any]], engine: EngineConfig) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    log.info("DeepSpeed's CPU Adam: its first use on a machine builds it, which takes minutes")
    try:
        return DeepSpeedCPUAdam(
            groups, lr=engine.lr, betas=engine.betas, eps=engine.eps, adamw_mode=engine.optimizer == "adamw"
        )
    except RuntimeError as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"engine.offload {engine.offload!r} with optimizer {engine.optimizer} takes DeepSpeed's CPU Adam, which "
            f"could not be built here: {reason[0]}; install a C++ compiler and ninja, or set "
            "engine.offload_optimizer=torch (equal states, slower updates)"
        ) from error
