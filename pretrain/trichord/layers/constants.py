"""Fixed fp32 numbers a module needs, which a cast of the module must not round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostConstant:
    """A small fp32 tensor kept on the host and copied once to each device that asks.

    Deliberately neither a buffer nor a parameter: engines call `module.bfloat16()`, which rounds float buffers
    (rotary frequencies in bf16 give wrong angles), and the meta device would swallow the values.
    """

    def __init__(self, values: Sequence | Tensor):
        # An explicit device, so that building under `torch.device("meta")` keeps the numbers.
        self._host = torch.as_tensor(values, dtype=torch.float32, device="cpu").detach().clone()
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The constant on `device`, fp32."""
        if device.type == "cpu":
            return self._host
        if device not in self._copies:
            with torch.inference_mode(False):  # a copy made in inference mode could not be used in training later
                self._copies[device] = self._host.to(device, non_blocking=True)
        return self._copies[device]
