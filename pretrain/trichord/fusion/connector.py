"""Connectors: a tower's feature tokens into the width of the trunk."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Connector(nn.Module):
    """`linear`: y = W x + b. `mlp`: y = W2 gelu(W1 x + b1) + b2. Both after a LayerNorm of x."""

    def __init__(self, kind: str, in_size: int, out_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_size)
        self.fc1 = nn.Linear(in_size, out_size)
        self.fc2 = nn.Linear(out_size, out_size) if kind == "mlp" else None

    def forward(self, features: Tensor) -> Tensor:
        """(..., in_size) -> (..., out_size)."""
        hidden = self.fc1(self.norm(features))
        return hidden if self.fc2 is None else self.fc2(F.gelu(hidden))
