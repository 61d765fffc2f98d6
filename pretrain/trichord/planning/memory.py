"""Bytes of the model states on each GPU under ZeRO, as formulas.

Notation of Rajbhandari et al. 2020 ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 3):
Psi trainable parameters, N data-parallel ranks, mixed precision with Adam. A rank holds without ZeRO

    2 Psi (16-bit weights) + 2 Psi (16-bit gradients) + K Psi,  K = 12: fp32 master, momentum and variance, 4 bytes each

and with stages 1, 2 and 3

    2 Psi + 2 Psi + K Psi / N        2 Psi + (2 + K) Psi / N        (2 + 2 + K) Psi / N

In fp32, and under autocast with fp32 parameters, weights and gradients take 4 bytes; DeepSpeed keeps a separate fp32
master of its partition there too (stages 1 to 3), so only stage 0 has K = 8. Frozen parameters are weights without
gradient or optimizer state; stage 3 partitions them like all others.

Where DeepSpeed differs from the paper (seen in its code and measured): at stage 1, gradients are whole only until they
are reduced; a rank enters the update with the gradients of all parameters that its partition touches, whole ones; at
stage 3, parameters below the persistence threshold are kept whole beside their partition; reduce buckets have
their configured size, however small the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trichord.engine.config import EngineConfig
from trichord.planning.zero import Parameter, Zero

GIB = 2**30
_SMALL_8BIT = 4096  # elements below which an 8-bit optimizer keeps fp32 states
_8BIT_BLOCK = 256  # elements that share a scale
_8BIT_CODES = 256  # of each coded moment, fp32: what its codes mean


@dataclass(frozen=True)
class ModelStates:
    """Bytes per rank. As the update begins: weights, gradients, master, moments, average (of the weights). On top of
    them backward: whole gradients and reduce buckets while gradients are made, gathered: weights that stage 3 holds
    whole meanwhile; update: what the update needs for itself. host: what offloading keeps there."""

    weights: int
    gradients: int
    master: int
    moments: int
    average: int
    backward: int
    gathered: int
    update: int
    host: int

    @property
    def held(self) -> int:
        """What a rank holds on its device as the update begins."""
        return self.weights + self.gradients + self.master + self.moments + self.average

    @property
    def in_backward(self) -> int:
        """The most that a rank holds in the backward pass, activations left out."""
        return self.held + self.backward + self.gathered

    @property
    def in_update(self) -> int:
        return self.held + self.update


def model_states(
    parameters: Sequence[Parameter], engine: EngineConfig, zero: Zero, rank: int | None = None
) -> ModelStates:
    """Model states of a rank (the formulas of this module), under the engine's optimizer, average and offload; rank
    None: the fullest.

    offload `optimizer` moves master and moments to the host, with an fp32 copy of the gradients there and, from stage 2
    on, no gradients left on the device; `all` moves the weights too.
    """
    trainable = [p for p in parameters if p.trainable]
    low, total = zero.weight_bytes, sum(p.numel for p in trainable)
    own = zero.own(trainable)
    weights = low * (zero.own(parameters) if zero.stage == 3 else sum(p.numel for p in parameters))
    weights += low * (zero.persistent(parameters) + zero.second_copy(parameters))
    gradients = low * zero.gradient_elements(trainable, rank)
    master = 4 * own if zero.stage > 0 or low == 2 else 0
    moments = moment_bytes(trainable, engine, zero)
    average = 4 * own if engine.ema_decay is not None else 0
    # At stage 1 all gradients are there when the reduction into the partition begins.
    whole = low * total if zero.stage == 1 else 0
    buckets = zero.bucket_bytes * (2 if zero.overlap and zero.stage < 3 else 1) if zero.stage else 0
    # The gradient partition is copied to fp32 in one piece before the optimizer runs.
    update, host = 4 * own if zero.stage else 0, 0
    if zero.stage == 3:  # its buckets live as long as the engine
        update += buckets
    if engine.offload != "none":
        host = master + moments + average + 4 * own
        master = moments = average = 0
        update -= 4 * own
        gradients = 0 if zero.stage >= 2 else gradients
    if engine.offload == "all":
        host += weights
        weights = 0
    return ModelStates(weights, gradients, master, moments, average, whole + buckets, _gathered(parameters, zero),
                       update, host)  # fmt: skip


def moment_bytes(trainable: Sequence[Parameter], engine: EngineConfig, zero: Zero) -> int:
    """Bytes of the optimizer's states on a rank.

    adam, adamw: two moments; sgd: momentum, where there is any; rmsprop: the average square, and momentum; muon: one
    momentum for the matrices of hidden layers, two moments for the rest; adamw_8bit: two moments of a byte each, with
    an fp32 scale per 256 and a table. fp32, or half of it where engine.optimizer_states is bf16.
    """
    name: str = engine.optimizer
    wide = 2 if engine.optimizer_states == "bf16" else 4
    own = zero.own(trainable)
    if name == "sgd":
        return wide * own * (engine.momentum > 0)
    if name == "rmsprop":
        return wide * own * (1 + (engine.momentum > 0))
    if name == "muon":
        matrices = zero.own([p for p in trainable if p.is_hidden])
        return wide * matrices + 2 * wide * (own - matrices)
    if name == "adamw_8bit":
        # What it has a state of: at stage 0 each parameter, from stage 1 on a rank's part of each group.
        groups = [[p] for p in trainable] if zero.stage == 0 else zero.groups(trainable)
        return sum(_eight_bit_bytes(zero.own(group)) for group in groups)
    return 2 * wide * own


def _eight_bit_bytes(elements: int) -> int:
    """Two moments of a tensor."""
    if elements < _SMALL_8BIT:
        return 8 * elements
    return 2 * (-(-elements // _8BIT_BLOCK) * (_8BIT_BLOCK + 4) + 4 * _8BIT_CODES)


def checkpoint_bytes(parameters: Sequence[Parameter], engine: EngineConfig) -> int:
    """Size of one checkpoint: fp32 weights of all parameters, the states of the trainable ones, and the average of the
    weights where one is kept, each once."""
    trainable = [p for p in parameters if p.trainable]
    whole = Zero(0, 1, 4, False, 0, False, False, 0, 0, 0, 0)
    average = 4 * whole.own(trainable) if engine.ema_decay is not None else 0
    coded = engine.optimizer == "adamw_8bit"  # written as the fp32 numbers that its codes mean
    moments = 8 * whole.own(trainable) if coded else moment_bytes(trainable, engine, whole)
    return 4 * whole.own(parameters) + moments + average


def _gathered(parameters: Sequence[Parameter], zero: Zero) -> int:
    """The weights that stage 3 may hold whole at a time, beside those it always does."""
    if zero.stage < 3:
        return 0
    split = sum(p.numel for p in parameters) - zero.persistent(parameters)
    largest = max((p.numel for p in parameters), default=0)
    return zero.weight_bytes * min(split, max(zero.live, largest) + zero.prefetch)
