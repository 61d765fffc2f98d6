"""Muon for the matrices of hidden layers, AdamW for everything else, on any ZeRO stage.

Jordan et al. 2024 ("Muon: an optimizer for hidden layers in neural networks"); the scale of the update is theirs, or
that of Liu et al. 2025 ("Muon is scalable for LLM training"), with which AdamW's rate and decay can be kept.

DeepSpeed has a Muon, too (0.19.8). It puts the update in the gradient's place before the gradient is clipped, so that
from stage 1 on the norm that is logged and clipped by is the update's and not the gradient's, and the steps differ from
those of stage 0. Here the optimizer itself brings the matrices together, after clipping.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from trichord.engine.matrices import Round, work_on

# Of the quintic iteration (Jordan et al. 2024): steepest at 0, and singular values end between 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5


def orthogonalize(matrices: Tensor) -> Tensor:
    """(parts, rows, columns) -> the same with singular values near 1, by Newton-Schulz iterations in its own dtype."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (x / (norm + 1e-7)).to(matrices.dtype)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Groups with `muon: True` hold matrices; the others are AdamW's. `place` must be called before the first step."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float,
        scale: Literal["match_rms_adamw", "original"],
        dtype: torch.dtype,
        device: torch.device,
        adamw: dict[str, Any],
    ):
        """dtype: of the iteration and of messages between ranks; device: where they happen; adamw: its options."""
        super().__init__(groups, {"lr": adamw["lr"], "weight_decay": 0.0, "muon": False})
        self.momentum, self.scale, self.dtype, self.device = momentum, scale, dtype, device
        # It shares the groups, which DeepSpeed changes in place, and the states.
        self._rest = torch.optim.AdamW(self._groups(muon=False) or [{"params": []}], **adamw)
        self._rest.state = self.state
        self._rounds: dict[int, list[Round]] = {}

    def place(self, rounds: dict[int, list[Round]]) -> None:
        """rounds: id of a master -> its matrices."""
        self._rounds = rounds

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient. From stage 1 on all ranks call it together."""
        for group in self._groups(muon=True):
            for master in group["params"]:
                if master.grad is not None:
                    self._update(master, group)
        self._rest.param_groups = self._groups(muon=False)
        self._rest.step()

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    def _update(self, master: Tensor, group: dict[str, Any]) -> None:
        state = self.state[master]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(master, memory_format=torch.contiguous_format)
        gradient, average = master.grad, state["momentum_buffer"]
        assert gradient is not None
        average.lerp_(gradient, 1.0 - self.momentum)
        direction = torch.lerp(gradient, average, self.momentum).to(self.dtype).reshape(-1)  # Nesterov's
        master.mul_(1.0 - group["lr"] * group["weight_decay"])
        flat = master.detach().view(-1)
        for round_ in self._rounds[id(master)]:
            updates = work_on(round_, direction, self.device, orthogonalize)
            for matrix, update in zip(round_, updates):
                rate = group["lr"] * _scale(self.scale, *matrix.shape[1:])
                flat.narrow(0, matrix.offset, update.numel()).add_(update.to(flat), alpha=-rate)


def _scale(kind: str, rows: int, columns: int) -> float:
    """original: sqrt(rows / columns) of a tall matrix; match_rms_adamw: entries of the size of AdamW's, 0.2."""
    if kind == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
