"""What of a model is stored besides its parameters: running statistics, which no gradient moves."""

from __future__ import annotations

from torch import Tensor, nn


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers by name, without those that the model computes anew when it is built."""
    return {
        f"{owner}.{name}".lstrip("."): buffer
        for owner, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and buffer.is_floating_point()
    }


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that a checkpoint holds."""
    return {**dict(model.named_parameters()), **stored_buffers(model)}
