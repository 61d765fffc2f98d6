"""Adam whose two moments are stored in bf16: 4 bytes for each parameter instead of 8. Arithmetic and weights are fp32.

DeepSpeed's own `bf16_optimizer_states` comes only with bf16 master weights, which lose small updates; here the masters
stay fp32, on any ZeRO stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

_BLOCK = 2**24  # elements whose moments are fp32 at a time


class HalfMomentsAdam(torch.optim.Optimizer):
    """torch's Adam or AdamW (`decoupled`) on moments that are bf16 between steps, rounded to the nearest."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        fused: bool,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": fused})
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        flat = [parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        blocks = [[tensor] for tensor in (parameter.detach(), *flat)]
        if parameter.is_contiguous():
            blocks = [tensor.reshape(-1).split(_BLOCK) for tensor in (parameter.detach(), *flat)]
        for weights, gradient, *moments in zip(*blocks, strict=True):
            self._update_block(weights, gradient, moments, state["step"].clone(), group)
        state["step"] += 1

    def _update_block(
        self, weights: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: dict[str, Any]
    ) -> None:
        first, second = (moment.float() for moment in moments)
        adam(
            *([weights], [gradient], [first], [second], [], [step]),
            foreach=False,
            fused=group["fused"],
            decoupled_weight_decay=self.decoupled,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for stored, new in zip(moments, (first, second)):
            stored.copy_(new)
