"""Floating-point operations of a vision tower, whatever its kind: counted once while one image runs through its shapes.

torch counts every matrix product and convolution of a forward pass on the meta device: no memory, under a second. So
convolutional towers and transformers, with class tokens, registers and biases, are counted alike and exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trichord.encoders.vision import VisionTower
from trichord.samples.config import ImageConfig

_ATTENTION_OPS = ("bmm", "baddbmm")  # attention's products have no weight, so torch runs them as batched ones


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs of one image's forward pass, 2 per multiplication and addition.

    stem: the first layer with weights, whose input is the image itself, so that nobody needs its gradient; layers: all
    other convolutions and linear maps; attention: products of queries, keys and values. last: part of `layers`, the
    last map of each transformer block, whose output no backward pass reads.
    """

    stem: float
    layers: float
    attention: float
    last: float


def image_flops(tower: VisionTower) -> ImageFlops:
    """FLOPs of one image through a tower; the tower itself is not run, and may be split over ranks or on no device."""
    with torch.device("meta"):
        twin = VisionTower(tower.config, ImageConfig(size=tower.image_size))
        pixels = torch.empty((1, 3, tower.image_size, tower.image_size), dtype=torch.uint8)
    twin.eval()  # batch statistics of one image at one pixel are refused; products are the same
    calls: list[tuple[nn.Module, float]] = []
    for module in twin.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            module.register_forward_hook(lambda module, _, output: calls.append((module, _layer_flops(module, output))))
    counter = FlopCounterMode(display=False)
    # The other kinds of attention are one op each, of which only some have a formula.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        twin(pixels)
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in by_op.items() if _name(op) in _ATTENTION_OPS)
    stem = calls[0][1] if calls else 0.0
    lasts = {id(module) for module in _last_maps(twin)}
    last = sum(flops for module, flops in calls if id(module) in lasts)
    return ImageFlops(stem, counter.get_total_flops() - attention - stem, float(attention), last)


def _last_maps(tower: nn.Module) -> list[nn.Module]:
    """The last linear map of each block of a transformer of timm's, where nothing scales its output."""
    blocks: list[Any] = [module for module in tower.modules() if hasattr(getattr(module, "mlp", None), "fc2")]
    scaled = [not isinstance(getattr(block, "ls2", nn.Identity()), nn.Identity) for block in blocks]
    scaled = [found or getattr(block, "gamma_2", None) is not None for block, found in zip(blocks, scaled)]
    return [block.mlp.fc2 for block, found in zip(blocks, scaled) if not found]


def _layer_flops(module: Any, output: torch.Tensor) -> float:
    """FLOPs of one call of a convolution or a linear map, from its output."""
    if isinstance(module, nn.Linear):
        return 2.0 * output.numel() * module.in_features
    return 2.0 * output.numel() * module.weight[0].numel()


def _name(op: Any) -> str:
    return str(op).split(".")[1]
