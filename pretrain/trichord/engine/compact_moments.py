"""Adam whose two moments are stored in fewer bytes between steps: bf16, or 8 bits. Arithmetic and weights are fp32.

bf16: 4 bytes for each parameter instead of 8. DeepSpeed's own `bf16_optimizer_states` comes only with bf16 master
weights, which lose small updates; here the masters stay fp32, on any ZeRO stage.

8 bits: 2 bytes. Codes of Dettmers et al. 2022 ("8-bit Optimizers via Block-wise Quantization"), by torchao: blocks of
256 elements, each with a scale. torchao's own AdamW8bit leaves a tensor in fp32 whose length is no multiple of 256, as
that of a ZeRO partition hardly ever is; here the last block is filled up. And here scales and the values of codes have
12 significant bits: decoded moments are exact, and coding them again gives the same codes, so a resume is bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adam import adam

from trichord.core.errors import ConfigError

_AT_A_TIME = 2**24  # elements whose moments are fp32 at a time; a multiple of _BLOCK
_BLOCK = 256
_SMALLEST = 4096  # elements; what has fewer stays fp32, as in bitsandbytes and torchao

Store = Literal["bf16", "8bit"]
Range = tuple[int, int]


@dataclass(frozen=True)
class Coded:
    """A moment in 8 bits. codes: (blocks * 256,) uint8; scales: (blocks,) fp32; values: (256,) fp32, what codes mean in
    units of their block's scale. No tensor: DeepSpeed would cut it like one."""

    codes: Tensor
    scales: Tensor
    values: Tensor

    def blocks(self, part: Range) -> tuple[Tensor, Tensor]:
        """Codes and scales of the whole blocks of a range that begins with one."""
        first, last = part[0] // _BLOCK, -(-part[1] // _BLOCK)
        return self.codes[first * _BLOCK : last * _BLOCK], self.scales[first:last]


Moment = Tensor | Coded


class CompactAdam(torch.optim.Optimizer):
    """torch's Adam or AdamW (`decoupled`) on moments that are rounded to the nearest after each step.

    A moment in the state is a bf16 tensor, a `Coded`, or, of small parameters in 8 bits, an fp32 tensor.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decoupled: bool,
        fused: bool,
        store: Store,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "fused": fused})
        self.decoupled, self.store = decoupled, store
        if store == "8bit":
            _torchao()  # a library that is missing is told now

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    @torch.no_grad()
    def pack(self, parameter: Tensor) -> None:
        """Store the moments of a parameter as this optimizer does, after they were put into its state as fp32."""
        state = self.state[parameter]
        for kind in ("exp_avg", "exp_avg_sq"):
            stored = self._zeros(parameter, kind)
            _write(stored, (0, parameter.numel()), state[kind].view(-1))
            state[kind] = stored

    def _zeros(self, parameter: Tensor, kind: str) -> Moment:
        if self.store == "bf16":
            return torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        if parameter.numel() < _SMALLEST:
            return torch.zeros_like(parameter.detach(), memory_format=torch.contiguous_format)
        blocks, device = -(-parameter.numel() // _BLOCK), parameter.device
        values = _to_12_bits(
            torch.tensor(_torchao().create_dynamic_map(signed=kind == "exp_avg"), device=device), 0x800
        )
        zero = int((values == 0).nonzero())
        codes = torch.full((blocks * _BLOCK,), zero, dtype=torch.uint8, device=device)
        return Coded(codes, torch.zeros(blocks, device=device), values)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state.update({kind: self._zeros(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")})
        moments = state["exp_avg"], state["exp_avg_sq"]
        weights, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
        for start in range(0, weights.numel(), _AT_A_TIME):
            part = start, min(start + _AT_A_TIME, weights.numel())
            first, second = (_read(moment, part) for moment in moments)
            step = state["step"].clone()  # each call counts it on
            self._adam(weights[slice(*part)], gradient[slice(*part)], first, second, step, group)
            for moment, new in zip(moments, (first, second)):
                _write(moment, part, new)
        state["step"] += 1

    def _adam(
        self, weights: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]
    ) -> None:
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


def unpacked(stored: Moment, numel: int) -> Tensor:
    """A moment as a flat tensor of its parameter's length: codes as fp32, others as they are, not copied."""
    return _read(stored, (0, numel)) if isinstance(stored, Coded) else stored.view(-1)


def _read(stored: Moment, part: Range) -> Tensor:
    """fp32, a copy unless it is stored so."""
    if not isinstance(stored, Coded):
        return stored.view(-1)[slice(*part)].float()
    codes, scales = stored.blocks(part)
    return _torchao().dequant_with_qmap(codes, stored.values, scales)[: part[1] - part[0]]


def _write(stored: Moment, part: Range, new: Tensor) -> None:
    if not isinstance(stored, Coded):
        stored.view(-1)[slice(*part)].copy_(new)
        return
    codes, scales = stored.blocks(part)
    blocks = torch.nn.functional.pad(new, (0, codes.numel() - new.numel())).view(-1, _BLOCK)
    scales.copy_(_scales(blocks, stored.values))
    codes.copy_(_torchao().quantize_8bit_with_qmap((blocks / scales[:, None]).view(-1), stored.values))


def _scales(blocks: Tensor, values: Tensor) -> Tensor:
    """(blocks,) fp32: with it the largest element is the largest value of its sign, rounded up to 12 bits."""
    low, high = blocks.amin(1), blocks.amax(1)
    if values[0] < 0:  # signed
        high = torch.where(-low >= high, low / values[0], high)
    return _to_12_bits(high.clamp(min=1e-30), 0xFFF)


def _to_12_bits(numbers: Tensor, add: int) -> Tensor:
    """fp32 numbers with 12 significant bits: the product of two is exact. add: to the 12 bits that are cut off."""
    return ((numbers.view(torch.int32) + add) & ~0xFFF).view(torch.float32)


def _torchao() -> Any:
    """The coding and decoding of blocks. Raises ConfigError where it is not installed."""
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ConfigError(
            f"engine.optimizer adamw_8bit needs torchao, which cannot be imported here ({error}); "
            "pip install 'trichord[8bit]', or use adamw"
        ) from error
    return quant_utils
