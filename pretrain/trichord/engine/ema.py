"""An exponential moving average of the weights, kept beside the masters: same slices, same device, always fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trichord.engine.masters import masters

# Kind of state under which checkpoints hold it.
AVERAGE = "ema"


class WeightAverage:
    """After each update `average = decay * average + (1 - decay) * weights`, from the weights it was made with.

    tensors: one for each of the rank's masters, of its shape and on its device. Frozen parameters have none: they are
    their own average.
    """

    def __init__(self, engine: Any, decay: float):
        self.decay = decay
        self._engine = engine
        self.tensors: list[Tensor] = [m.detach().to(torch.float32, copy=True) for m in masters(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Take the masters in. Call it after each update that was applied; reads nothing back to the host."""
        live = [master.detach() for master in masters(self._engine)]
        torch._foreach_lerp_(self.tensors, live, 1.0 - self.decay)
