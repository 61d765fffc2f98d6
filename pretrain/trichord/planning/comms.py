"""What a step sends: the collectives of ZeRO and of the contrastive objectives, and how long they take.

Bytes are those of the whole tensor that a collective is about. What one of N ranks sends in a ring is
(N - 1) / N of it for all-gather, reduce-scatter, reduce and broadcast, twice that for an all-reduce (Patarasu and Yuan
2009). For an all-to-all they are what each rank puts in, and a rank sends (N - 1) / N of that.

The time is an alpha-beta model: a latency per message and hop, and bytes over the slowest link of the ring. Hops are
those of NCCL's own cost model (NVIDIA/nccl, src/graph/tuning.cc; PAT: Jeaugey 2025, arXiv 2506.20252); small messages
are all latency:

    all-reduce        a tree: up and down the node's chain and the logarithm of the nodes
    all-gather,       a ring over all ranks: R - n hops inside of nodes and n - 1 between, for R ranks on n nodes, as
    reduce-scatter,   trees do not serve these; the logarithm of the nodes only where each has one GPU, for the first
    reduce            two (PAT, from NCCL 2.23 on; with several GPUs in a node NCCL does not choose it)
    all-to-all        a message to each peer of the node, and to each other node

Not counted, all of which make it faster: NVLink SHARP in a node, SHARP in switches, PAT over several GPUs of a node.

Volumes per step (Psi gradients in bytes, A micro-steps), as DeepSpeed does it with this project's settings:

    stage 0   all-reduce Psi once
    stage 1   reduce Psi once, all-gather of the weights once
    stage 2   reduce Psi A times, all-gather of the weights once
    stage 3   reduce-scatter Psi A times; all-gather of the split weights for each forward and each backward pass, less
              what stays gathered between the two; all-gather of small, persistent weights once. With hpZ only the
              first gather of a weight that learns is over all ranks, every other one inside a node
    muon      from stage 1 on, matrices of which several ranks hold a part: all-to-all there and back
    all       all-reduce of the step's counts, and from stage 1 on of each optimizer group's gradient norm
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trichord.engine.step import COUNT_NAMES
from trichord.planning.gpus import Fabric
from trichord.planning.muon_exchange import muon_exchange
from trichord.planning.zero import Parameter, Zero

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "reduce", "all_to_all"]
Beside = Literal["forward", "backward", "nothing"]
_ROUNDS: dict[Op, int] = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1, "all_to_all": 1}
_COUNTS_BYTES = 8 * len(COUNT_NAMES)
_READ_DATA = ("vision", "audio", "text")
TOWERS = ("vision", "audio", "text", "heads")  # what the gradient-free pass of contrastive accumulation runs


@dataclass(frozen=True)
class Collective:
    """One kind of message of a step. bytes: of a whole step; messages: in how many pieces; beside: the computation that
    it can run beside; ranks: that it is between, neighbours; None: all of them."""

    what: str
    op: Op
    bytes: int
    messages: int
    beside: Beside = "nothing"
    ranks: int | None = None

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends, of so many in the job; in a ring, but for an all-to-all."""
        ranks = self.ranks or ranks
        return _ROUNDS[self.op] * self.bytes * (ranks - 1) / ranks

    def seconds(self, fabric: Fabric, ranks: int) -> float:
        """On `ranks` GPUs, each node full before the next is begun. In an all-to-all each GPU has only its own part of
        the node's network."""
        ranks = self.ranks or ranks
        if ranks == 1:
            return 0.0
        nodes = math.ceil(ranks / fabric.gpus_per_node)
        alone = self.op == "all_to_all" and nodes > 1
        speed = fabric.own_bytes_per_s() if alone else fabric.ring_bytes_per_s(nodes)
        return self.latency_s(fabric, ranks) + self.sent(ranks) / speed

    def latency_s(self, fabric: Fabric, ranks: int) -> float:
        """Seconds of all its messages that no bandwidth makes shorter: hops as in this module's list."""
        ranks = self.ranks or ranks
        nodes = math.ceil(ranks / fabric.gpus_per_node)
        if nodes > 1 and self.op in ("all_gather", "reduce_scatter", "reduce"):
            return self.messages * _ring_latency_s(fabric, ranks, nodes, self.op)
        inside = (min(ranks, fabric.gpus_per_node) - 1) * fabric.alpha_inside_s * _ROUNDS[self.op]
        between = 2 * math.ceil(math.log2(nodes)) if self.op == "all_reduce" else nodes - 1
        return self.messages * (inside + between * fabric.alpha_between_s)


@dataclass(frozen=True)
class Features:
    """The exchange of contrastive objectives: slots per rank and step, embedding size, modalities, whether towers run
    once more without gradients (with accumulation)."""

    slots: int
    embed_dim: int
    modalities: int


def _ring_latency_s(fabric: Fabric, ranks: int, nodes: int, op: Op) -> float:
    """Of one message between nodes."""
    ring = (ranks - nodes) * fabric.alpha_ring_inside_s + (nodes - 1) * fabric.alpha_ring_between_s
    if fabric.gpus_per_node > 1 or op == "reduce":
        return ring
    return min(ring, math.ceil(math.log2(nodes)) * fabric.alpha_between_s)


def collectives(
    parameters: Sequence[Parameter], zero: Zero, accumulation: int, features: Features | None
) -> list[Collective]:
    """All collectives of one step but those of ranks that share rows (`planning.sharing`)."""
    if zero.ranks == 1:
        return []
    found = _gradients(parameters, zero, accumulation)
    if zero.stage in (1, 2):
        size = zero.weight_bytes * sum(p.numel for p in parameters if p.trainable)
        found.append(Collective("updated weights", "all_gather", size, _pieces(size, zero)))
    if zero.stage == 3:
        found += _gathers(parameters, zero, accumulation, features)
    if (exchange := muon_exchange(parameters, zero))[0]:
        found.append(Collective("matrices of muon", "all_to_all", *exchange))
    norms = len(zero.groups(parameters)) if zero.stage else 0
    norm_bytes = 8 if zero.stage == 3 else 4
    found.append(Collective("counts, norms", "all_reduce", _COUNTS_BYTES + norms * norm_bytes, 1 + norms))
    return found + (_feature_exchange(features, zero.ranks) if features is not None else [])


def _gradients(parameters: Sequence[Parameter], zero: Zero, accumulation: int) -> list[Collective]:
    size = zero.gradient_bytes(parameters)
    op: Op = "all_reduce" if zero.stage == 0 or zero.whole_bucket_all_reduce else "reduce"
    if zero.stage == 3:
        op = "reduce_scatter"
    times = accumulation if zero.stage >= 2 else 1
    pieces = _pieces(size, zero)
    if op == "reduce":  # a piece for each rank's part of a bucket
        pieces = max(pieces, zero.ranks)
    beside: Beside = "backward" if zero.stage and zero.overlap else "nothing"
    return [Collective("gradients", op, times * size, times * pieces, beside)]


def _gathers(
    parameters: Sequence[Parameter], zero: Zero, accumulation: int, features: Features | None
) -> list[Collective]:
    """Stage 3 gathers a weight for each module that uses it (twice, where it is tied) and lets go of it, unless its
    next use is near: what a pass of fewer than `reuse` elements uses again stays. The gradient-free passes of
    contrastive accumulation disturb the order that DeepSpeed has recorded; then nothing stays. No gradient goes back
    to what is frozen in a tower, whose input is data, so the backward pass does not gather it.
    A block that is recomputed is gathered for that too, but for its last product, which nobody needs again."""
    split = [p for p in parameters if p.numel >= zero.persistence]
    size = zero.travelling_bytes
    disturbed = features is not None and accumulation > 1
    whole, whole_bytes = sum(p.numel for p in split), sum(size(p) for p in split)
    back = [p for p in split if p.trainable or p.room not in _READ_DATA]
    near = min(whole, zero.reuse // 2, zero.live)
    if near == whole:  # nothing is let go of inside a pass: each weight comes once, tied or not
        forward, backward = whole_bytes, sum(size(p) for p in back) if disturbed else 0
    else:
        forward = sum(size(p) * p.owners for p in split)
        again = zero.recomputed * sum(size(p) for p in back if p.recomputed)
        stays = 0 if disturbed else near * whole_bytes // whole
        backward = max(0, sum(size(p) * p.owners for p in back) + round(again) - stays)
    pieces = max(1, math.ceil(whole / max(1, zero.prefetch)), len(split) // 4)
    inside, first = (zero.hpz, min(forward, sum(size(p) for p in split if p.trainable))) if zero.hpz > 1 else (None, 0)
    near_bytes = forward * accumulation - first  # with hpZ from the node's own copy, which the update puts out of date
    found = [
        Collective("weights, first", "all_gather", first, pieces, "forward"),
        Collective("weights, forward", "all_gather", near_bytes, pieces * accumulation, "forward", inside),
        Collective(
            "weights, backward", "all_gather", backward * accumulation, pieces * accumulation, "backward", inside
        ),
    ]
    if disturbed:
        towers = sum(size(p) * p.owners for p in split if p.room in TOWERS)
        found.append(
            Collective("weights, features", "all_gather", towers * accumulation, accumulation, "forward", inside)
        )
    if kept := zero.persistent(parameters):
        small = sum(p.numel < zero.persistence for p in parameters)
        found.append(Collective("small weights", "all_gather", zero.weight_bytes * kept, small))
    return [c for c in found if c.bytes]


def _feature_exchange(features: Features, ranks: int) -> list[Collective]:
    """Features of all slots, four int64 facts of each, and the gradients by all candidates (fp32)."""
    rows = features.slots * ranks
    gradients = 4 * (rows + 1) * features.embed_dim * features.modalities
    table = 4 * rows * features.embed_dim * features.modalities + 4 * 8 * rows
    return [
        Collective("features", "all_gather", table, features.modalities + 1),
        Collective("feature gradients", "all_reduce", gradients, 1),
    ]


def _pieces(size: int, zero: Zero) -> int:
    return max(1, math.ceil(size / (zero.bucket * zero.weight_bytes)))
