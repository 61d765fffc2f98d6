"""Optimizer parameter groups: what is decayed, and how fast each room and layer learns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from trichord.core.errors import ConfigError
from trichord.core.schedule import lr_multiplier
from trichord.engine.config import EngineConfig, RoomRates
from trichord.fusion.model import param_room

# How timm and transformers number the layers of a tower: `blocks.3.`, `encoder.layers.3.`, `layer.3.`, `stages.3.`
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|stages)\.(\d+)\.")
_FUSED = re.compile(r"\.(?:qkv|in_proj|c_attn)(?:\.|_)weight$")
_EMBEDDING = re.compile(r"embed|cls_token|pos_|(?:^|\.)(?:stem|conv1|conv2)\.")


def build_param_groups(
    model: nn.Module, engine: EngineConfig, room_of: Callable[[str], str] = param_room
) -> list[dict[str, Any]]:
    """Groups for `torch.optim`, one per distinct rate; matrices (2 and more axes) are decayed, vectors are not.

    Each has, beside torch's keys, `name`, `muon` (whether it holds matrices for Muon), and `base_lr`, `lr_ratio`,
    `schedule` and `start_step`, which `rate_of` reads. Must be called before the engine partitions the parameters:
    ZeRO-3 leaves them with empty shapes.

    Raises:
        ConfigError: a room that is to learn at its own rate is not in the model, or is frozen; Muon has no matrix.
        ValueError: the model has no trainable parameter.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the model has no trainable parameter: every room is frozen")
    _check_rooms(engine, {room_of(name) for name in trainable} if engine.rooms else set())
    depths = _depths(trainable, room_of) if engine.rooms else {}
    of_room: dict[str, RoomRates] = {**engine.rooms}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        room = room_of(name) if of_room else ""
        rates = of_room.get(room, RoomRates())
        ratio = rates.lr_ratio * rates.layer_decay ** (depths[room] - _layer(name, depths[room]) if of_room else 0)
        decay = engine.weight_decay if rates.weight_decay is None else rates.weight_decay
        decay = decay if parameter.dim() >= 2 else 0.0
        schedule = rates.schedule or engine.schedule
        muon = engine.optimizer == "muon" and fused_matrices(name, parameter) > 0
        kind = "muon" if muon else "decay" if parameter.dim() >= 2 else "no_decay"
        key = (kind, ratio, decay, schedule, rates.start_step)
        group = groups.setdefault(key, _new_group(engine, *key))
        group["params"].append(parameter)
    order = ("muon", "decay", "no_decay")
    if engine.optimizer == "muon" and all(key[0] != "muon" for key in groups):
        raise ConfigError(
            "engine.optimizer muon: no matrix of a hidden layer learns, so there is nothing for it; use adamw"
        )
    return [groups[key] for key in sorted(groups, key=lambda key: (order.index(key[0]), -key[1], *key[2:]))]


def fused_matrices(name: str, parameter: nn.Parameter) -> int:
    """How many matrices of hidden layers a parameter holds: 3 where queries, keys and values are one projection; none
    where it is no linear map in a numbered layer or a connector: embeddings, heads, vectors, convolutions."""
    hidden = _LAYER.search(name) or name.startswith("connectors.")
    shape = getattr(parameter, "ds_shape", parameter.shape)
    if not hidden or len(shape) != 2 or _EMBEDDING.search(name) or not name.endswith("weight"):
        return 0
    return 3 if _FUSED.search(name) and shape[0] % 3 == 0 else 1


def rate_of(group: dict[str, Any], engine: EngineConfig, step: int, total_steps: int) -> float:
    """Learning rate of a group at optimizer step `step` (0-based); 0 before its room starts."""
    start = group["start_step"]
    if step < start:
        return 0.0
    multiplier = lr_multiplier(
        group["schedule"],
        step,
        warmup_steps=engine.warmup_steps,
        total_steps=total_steps,
        min_ratio=engine.min_lr_ratio,
        decay_steps=engine.decay_steps,
    )
    late = min(1.0, (step - start + 1) / engine.warmup_steps) if start and engine.warmup_steps else 1.0
    return group.get("base_lr", engine.lr) * group["lr_ratio"] * multiplier * late


def rates_of_rooms(engine: EngineConfig, step: int, total_steps: int) -> dict[str, float]:
    """Room -> learning rate at `step` of its last layers, for the rooms that have rates of their own."""
    return {
        room: rate_of(
            {"lr_ratio": r.lr_ratio, "schedule": r.schedule or engine.schedule, "start_step": r.start_step},
            *(engine, step, total_steps),
        )
        for room, r in engine.rooms.items()
    }


def _new_group(
    engine: EngineConfig, kind: str, ratio: float, decay: float, schedule: str, start: int
) -> dict[str, Any]:
    name = kind
    base = engine.muon.lr if kind == "muon" and engine.muon.lr is not None else engine.lr
    if ratio != 1.0 or schedule != engine.schedule or start:
        name += f" x{ratio:g} {schedule}" + (f" from {start}" if start else "")
    return {
        "name": name,
        "params": [],
        "lr": base * ratio,
        "base_lr": base,
        "weight_decay": decay,
        "muon": kind == "muon",
        "lr_ratio": ratio,
        "schedule": schedule,
        "start_step": start,
    }


def _check_rooms(engine: EngineConfig, there: set[str]) -> None:
    missing = [room for room in engine.rooms if room not in there]
    if missing:
        raise ConfigError(
            f"engine.rooms.{missing[0]}: the model has no trainable parameter in that room; its rooms that learn are "
            f"{', '.join(sorted(there))}; take the key out, or unfreeze the room"
        )


def _depths(names: dict[str, Any], room_of: Callable[[str], str]) -> dict[str, int]:
    """Of each room the number of its last place: layers are 1 to L, embeddings 0, what comes behind them L + 1."""
    depths: dict[str, int] = {}
    for name in names:
        found = _LAYER.search(name)
        room = room_of(name)
        depths[room] = max(depths.get(room, 0), int(found[1]) + 2 if found else 0)
    return depths


def _layer(name: str, depth: int) -> int:
    """The place of a parameter in its room, 0 to depth."""
    found = _LAYER.search(name)
    if found:
        return int(found[1]) + 1
    return 0 if _EMBEDDING.search(name) else depth
