"""Checks that all public ops share: tensors where tensors are meant, on one device, and options that are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from numbers import Real

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_tensors(op: str, required: Mapping[str, object], optional: Mapping[str, object] | None = None) -> None:
    """Raise ValueError for a number, list or None where an operand has to be a tensor, and for tensors on different
    devices; a scalar () may lie on the CPU beside others on a GPU, as with torch's own ops."""
    tensors: dict[str, Tensor] = {}
    for name, value in {**required, **{k: v for k, v in (optional or {}).items() if v is not None}}.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}; see torch.tensor")
        tensors[name] = value
    devices = {name: t.device for name, t in tensors.items() if t.dim() or t.device.type != "cpu"}
    if len(set(devices.values())) > 1:
        said = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{op}: expected all tensors on one device, got {said}; move them")


def require_floats(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor holds numbers that the op can compute with."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{op}: expected {name} in float32, bfloat16 or float16, got {tensor.dtype}; cast it")


def require_above_zero(op: str, **options: object) -> None:
    """Raise ValueError for an option that is given and no finite number above 0."""
    for name, value in options.items():
        if value is not None and not (_is_finite(value) and value > 0):  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{op}: expected {name} to be a number above 0, got {_shown(value)}")


def require_not_negative(op: str, **options: object) -> None:
    """Raise ValueError for an option that is no finite number of at least 0."""
    for name, value in options.items():
        if not (_is_finite(value) and value >= 0):  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{op}: expected {name} to be a number of at least 0, got {_shown(value)}")


def require_integers(op: str, **options: object) -> None:
    """Raise ValueError for an option that is given and no whole number."""
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, torch.SymInt))):
            raise ValueError(f"{op}: expected {name} to be a whole number, got {_shown(value)}")


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for a device; devices that have none (meta) count as off."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off inside; on devices that have none (meta) nothing is to be done."""
    has_one = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if has_one else nullcontext()


def _is_finite(value: object) -> bool:
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return True
    # not math.isfinite, which breaks a compiled graph; of NaN and infinities the difference is NaN
    return isinstance(value, Real) and not isinstance(value, bool) and value - value == 0


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (Real, str)) else type(value).__name__
