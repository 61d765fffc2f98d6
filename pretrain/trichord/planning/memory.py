"""Bytes of the model states on each GPU under ZeRO, as formulas. No torch.

Notation of Rajbhandari et al. 2020 ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 3):
Psi trainable parameters, N data-parallel ranks, mixed precision with Adam. A rank holds without ZeRO

    2 Psi (16-bit weights) + 2 Psi (16-bit gradients) + K Psi,  K = 12: fp32 master, momentum and variance, 4 bytes each

and with stages 1, 2 and 3

    2 Psi + 2 Psi + K Psi / N        2 Psi + (2 + K) Psi / N        (2 + 2 + K) Psi / N

In fp32, and under autocast with fp32 parameters, weights and gradients take 4 bytes; DeepSpeed keeps a separate fp32
master of its partition there too (stages 1 to 3), so only stage 0 has K = 8. Frozen parameters are weights without
gradient or optimizer state; stage 3 partitions them like all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16", "autocast_bf16"]
Offload = Literal["none", "optimizer", "all"]

GIB = 2**30
_BUCKET_ELEMENTS = 500_000_000  # engine.deepspeed_config.BUCKET_ELEMENTS; the engine room lies above, but imports torch
_LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class ModelStates:
    """Bytes per rank. On the device: weights, gradients, master, moments, buffers (what ZeRO needs to communicate:
    reduce buckets, and at stage 3 the layers that are gathered at a time); host: what offloading keeps there."""

    weights: int
    gradients: int
    master: int
    moments: int
    buffers: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.master + self.moments + self.buffers


def model_states(
    trainable: int,
    frozen: int,
    *,
    zero_stage: int,
    precision: Precision,
    world_size: int,
    offload: Offload = "none",
) -> ModelStates:
    """Model states per rank, in bytes, for `trainable` and `frozen` parameters (the formulas of this module).

    offload `optimizer` moves master and moments to the host, with an fp32 copy of the gradients there (16 bytes per
    element of the partition) and, from stage 2 on, no gradients left on the device; `all` moves the weights too.
    """
    low = 2 if precision in ("bf16", "fp16") else 4
    own = -(-trainable // world_size)  # a rank's partition, padded to whole elements
    weights = low * (-(-(trainable + frozen) // world_size) if zero_stage == 3 else trainable + frozen)
    gradients = low * (own if zero_stage >= 2 else trainable)
    has_master = zero_stage > 0 or low == 2
    optimized = own if zero_stage >= 1 else trainable
    master, moments = 4 * optimized if has_master else 0, 8 * optimized
    buffers, host = _buffers(trainable, trainable + frozen, zero_stage, low), 0
    if offload != "none":
        host = master + moments + 4 * own
        master = moments = 0
        gradients = 0 if zero_stage >= 2 else gradients
    if offload == "all":
        host += weights
        weights = 0
    return ModelStates(weights, gradients, master, moments, buffers, host)


def checkpoint_bytes(trainable: int, frozen: int) -> int:
    """Size of one checkpoint: fp32 weights of all parameters and both moments of the trainable ones, each once."""
    return 4 * (trainable + frozen) + 8 * trainable


def _buffers(trainable: int, total: int, zero_stage: int, low: int) -> int:
    """Buckets that gradients are reduced in (two from stage 2 on, where reducing overlaps the backward pass), and the
    weights that stage 3 may hold gathered at a time."""
    if zero_stage == 0:
        return 0
    buckets = low * min(_BUCKET_ELEMENTS, trainable) * (2 if zero_stage >= 2 else 1)
    gathered = low * min(_LIVE_ELEMENTS, total) if zero_stage == 3 else 0
    return buckets + gathered
