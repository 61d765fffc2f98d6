"""Time of a step: each class of work at its assumed share of the GPU's peak, and collectives beside or after it.

    products    FLOPs / (peak * products)          matrix products and convolutions
    attention   FLOPs / (peak * attention)         fused attention, the mask's true area
    elementwise bytes / (bandwidth * memory)       norms, activations, residual sums; backward moves twice as much
    launches    kernels * 4 us                     the least that a pass takes: the CPU has to start every kernel
    update      bytes / (bandwidth * memory)       gradient, master, moments, weights

A collective that can run beside the backward or forward pass costs what is longer than that pass, and at least a tenth
of itself; others cost all of it. Time of the loader, of checkpoints and of evaluation is not in here: all run beside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trichord.fusion.counts import count_contrasts
from trichord.fusion.flops import Flops, step_flops
from trichord.planning.comms import Collective, Features, collectives
from trichord.planning.gpus import Fabric, Gpu
from trichord.planning.layout import Layout, engine_of, split_of
from trichord.planning.memory import ModelStates
from trichord.planning.recomputation import moves_again, products_again
from trichord.planning.sharing import exchanges
from trichord.planning.subject import Subject
from trichord.planning.zero import Zero

LAUNCH_S = 4e-6
HIDDEN_FRAC = 0.9  # of a collective that runs beside computation
HOST_GB_PER_S = 20.0  # of one GPU to host memory, where states are offloaded
HOST_ADAM_GB_PER_S = 100.0  # of a node's memory, that its ranks' updates on the CPU share


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on every GPU. products to launches: of all micro-steps, forward, backward and recomputed;
    exposed: of collectives that nothing hides; update."""

    products: float
    attention: float
    elementwise: float
    launches: float
    exposed: float
    update: float
    offload: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, Any]:
        return {"step_s": self.total, **{f"{name}_s": value for name, value in asdict(self).items()}}


def features_of(subject: Subject, layout: Layout, ranks: int) -> Features | None:
    """The exchange of the contrastive objective, or None without one."""
    config = subject.config
    if config.objectives.contrastive is None:
        return None
    samples = layout.micro_rows * config.batches.max_samples_per_row
    slots = math.ceil(samples / layout.sharing) * split_of(subject, layout, ranks).accumulation
    towers = (config.encoders.vision, config.encoders.audio, config.encoders.text)
    return Features(slots, config.objectives.contrastive.embed_dim, sum(tower is not None for tower in towers))


def collectives_of(subject: Subject, layout: Layout, zero: Zero) -> list[Collective]:
    accumulation = split_of(subject, layout, zero.ranks).accumulation
    features = features_of(subject, layout, zero.ranks)
    key = (zero, accumulation, features)
    if key not in subject.kept:
        subject.kept[key] = collectives(subject.parameters, zero, accumulation, features)
    if layout.sharing == 1:
        return subject.kept[key]
    load, engine = subject.load(layout.checkpointing, layout.sharing), engine_of(subject, layout)
    sent = {kind: size * layout.micro_rows for kind, size in load.sent.items()}
    return [*subject.kept[key], *exchanges(sent, load.messages, engine, accumulation)]


def step_time(subject: Subject, layout: Layout, zero: Zero, states: ModelStates, gpu: Gpu, fabric: Fabric) -> StepTime:
    """The roofline of this module."""
    accumulation = split_of(subject, layout, zero.ranks).accumulation
    twice = subject.config.objectives.contrastive is not None and accumulation > 1
    peak = 1e12 * (gpu.fp32_tflops if subject.config.engine.precision == "fp32" else gpu.bf16_tflops)
    products, attention = _seconds_of_products(subject, layout, zero.ranks, twice, peak, gpu)
    load = subject.load(layout.checkpointing, layout.sharing)
    passes = 1 + 2 * subject.learns + moves_again(engine_of(subject, layout))
    moved = (passes * load.moved + twice * load.moved_by_towers) * layout.micro_rows
    elementwise = moved / (1e9 * gpu.memory_gb_per_s * gpu.memory)
    least = (passes + twice) * load.launches * LAUNCH_S
    micro = products + attention + elementwise
    launches = max(0.0, least - micro)
    compute = (micro + launches) * accumulation
    exposed = _exposed(collectives_of(subject, layout, zero), compute, fabric, zero.ranks)
    update, offload = _update(states, zero, subject, gpu, fabric)
    each = accumulation
    return StepTime(products * each, attention * each, elementwise * each, launches * each, exposed, update, offload)


def flops_of_rows(subject: Subject, layout: Layout, ranks: int, *, rows: float, useful: bool) -> dict[str, Flops]:
    """Room -> FLOPs of `rows` rows, as asked for or as executed, the contrastive part of one rank left out."""
    counts = (subject.useful if useful else subject.executed) * rows
    again = products_again(engine_of(subject, layout))
    return step_flops(subject.flops, counts, blocks_again=again)


def model_flops(subject: Subject, layout: Layout) -> float:
    """FLOPs that the model needs per step, whatever the layout: the numerator of MFU."""
    if "model_flops" not in subject.kept:
        rows = subject.config.batches.rows_per_step
        found = flops_of_rows(subject, layout, 1, rows=rows, useful=True)
        subject.kept["model_flops"] = sum(flops.model for flops in found.values())
    return subject.kept["model_flops"]


def _seconds_of_products(
    subject: Subject, layout: Layout, ranks: int, twice: bool, peak: float, gpu: Gpu
) -> tuple[float, float]:
    """Seconds of products and of attention in one micro-step."""
    counts = subject.executed * (layout.micro_rows / layout.sharing)  # of attention a share of the heads
    again = products_again(engine_of(subject, layout))
    seconds = {True: 0.0, False: 0.0}
    for piece in subject.flops:
        # Only attention computes its forward pass again whatever the layout, beside the loss and the similarities.
        is_attention = piece.again > 0 and piece.unit not in ("labels", "contrasts")
        flops = step_flops([piece], counts, blocks_again=again, towers_twice=twice)
        share = gpu.attention if is_attention else gpu.products
        seconds[is_attention] += sum(room.hardware for room in flops.values()) / (peak * share)
    return seconds[False] + _contrast_seconds(subject, layout, ranks, gpu), seconds[True]


def _contrast_seconds(subject: Subject, layout: Layout, ranks: int, gpu: Gpu) -> float:
    """Similarities of a rank's slots with those of all ranks, in fp32, shared out over the step's micro-steps."""
    features, contrastive = features_of(subject, layout, ranks), subject.config.objectives.contrastive
    if features is None or contrastive is None:
        return 0.0
    directions = 1 if contrastive.kind == "sigmoid" else 2
    similarities = count_contrasts(features.slots, ranks, len(contrastive.pairs), directions)
    flops = 8.0 * features.embed_dim * similarities  # forward, again, and two products backward
    return flops / (1e12 * gpu.fp32_tflops * 0.5) / split_of(subject, layout, ranks).accumulation


def _exposed(found: Sequence[Collective], compute: float, fabric: Fabric, ranks: int) -> float:
    """Seconds of collectives that lengthen the step."""
    share = {"forward": 1 / 3, "backward": 2 / 3, "nothing": 0.0}
    exposed = 0.0
    for beside, part in share.items():
        seconds = sum(c.seconds(fabric, ranks) for c in found if c.beside == beside)
        exposed += max(seconds - part * compute * HIDDEN_FRAC, seconds * (1 - HIDDEN_FRAC if part else 1.0))
    return exposed


def _update(states: ModelStates, zero: Zero, subject: Subject, gpu: Gpu, fabric: Fabric) -> tuple[float, float]:
    """(seconds on the device, seconds of offloading)."""
    if states.host == 0:
        moved = 2 * (states.master + states.moments + states.average) + states.gradients + states.update
        return moved / (1e9 * gpu.memory_gb_per_s * gpu.memory), 0.0
    on_node = min(zero.ranks, fabric.gpus_per_node)
    own = zero.own([p for p in subject.parameters if p.trainable])
    transfer = 2 * zero.weight_bytes * own / (1e9 * HOST_GB_PER_S)
    return 0.0, transfer + 2 * states.host * on_node / (1e9 * HOST_ADAM_GB_PER_S)
