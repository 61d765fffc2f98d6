"""Everything a plan takes for granted, in words; printed with it."""

from __future__ import annotations

from trichord.planning.gpus import Fabric
from trichord.planning.layout import CONTEXT_BYTES, FRAGMENTATION_FRAC, PROCESS_BYTES, WORKER_BYTES
from trichord.planning.memory import GIB
from trichord.planning.roofline import HIDDEN_FRAC, HOST_ADAM_GB_PER_S, HOST_GB_PER_S, LAUNCH_S
from trichord.planning.search import Machine
from trichord.planning.subject import Subject


def assumptions(subject: Subject, machine: Machine) -> list[str]:
    """One sentence each."""
    return [
        subject.vocab_note,
        *(f"data: {note}" for note in subject.workload.origin),
        *_memory(subject),
        *_time(subject, machine),
        *_not_looked_at(subject),
    ]


def _memory(subject: Subject) -> list[str]:
    engine = subject.config.engine
    low = "2 bytes" if engine.precision in ("bf16", "fp16") else "4 bytes"
    if subject.rule == "triton":
        rule = "what the fused ops save on a GPU; no GPU has checked it (the same trace of the CPU path is checked)"
    else:
        rule = "what the plain-torch path saves, more than on a GPU: triton is not installed here"
    lines = [
        f"weights and gradients {low} an element, fp32 master 4, states of {engine.optimizer} "
        "(ZeRO, Rajbhandari et al. 2020, section 3); at stage 1 gradients are whole until they are reduced",
        "buffers: DeepSpeed's reduce buckets as large as the engine makes them, and what stage 3 may hold gathered",
        f"activations: {rule}",
        f"fits: the heaviest source's rows fill a micro-batch ({subject.heaviest[1]:.2f} times a typical one)",
        f"{100 * FRAGMENTATION_FRAC:.0f} % fragmentation; {CONTEXT_BYTES / GIB:.1f} GiB for context, NCCL and cuBLAS",
        f"host: {PROCESS_BYTES / GIB:.0f} GiB per rank, {WORKER_BYTES / GIB:.0f} GiB per data worker, a copy of the "
        "rank's checkpoint part, batches made ahead",
    ]
    if engine.offload != "none":
        lines.append("offload keeps master, moments and an fp32 copy of the gradients on the host")
    return lines


def _time(subject: Subject, machine: Machine) -> list[str]:
    gpu, fabric = machine.gpu, machine.fabric
    peak = gpu.fp32_tflops if subject.config.engine.precision == "fp32" else gpu.bf16_tflops
    return [
        f"{gpu.name}: {peak:g} TFLOP/s dense, {gpu.memory_gb_per_s:,.0f} GB/s, {gpu.memory_gib} GiB (data sheet); "
        f"products reach {100 * gpu.products:.0f} % of the peak, attention {100 * gpu.attention:.0f} %, the rest "
        f"{100 * gpu.memory:.0f} % of the bandwidth (assumed, see docs/guides/planning.md)",
        f"a kernel takes at least {LAUNCH_S * 1e6:.0f} us; the backward pass moves twice the forward pass's bytes",
        f"{fabric.gpus_per_node} GPUs per node, {fabric.link_gb_per_s:.0f} GB/s between them, "
        f"{fabric.node_gb_per_s:.0f} GB/s from node to node, {100 * fabric.share:.0f} % of it reached; "
        f"{fabric.alpha_inside_s * 1e6:.0f} us and {fabric.alpha_between_s * 1e6:.0f} us a hop",
        _algorithms(fabric),
        f"{100 * HIDDEN_FRAC:.0f} % of a collective that runs beside computation is hidden, as far as that lasts",
        f"offload: {HOST_GB_PER_S:.0f} GB/s per GPU to the host, {HOST_ADAM_GB_PER_S:.0f} GB/s for a node's updates",
        "data, checkpoints and evaluation never hold a step up, ranks are equally fast, nothing fails",
    ]


def _algorithms(fabric: Fabric) -> str:
    inside, between = fabric.alpha_ring_inside_s * 1e6, fabric.alpha_ring_between_s * 1e6
    ring = "PAT's logarithm of the nodes (NCCL from 2.23 on)" if fabric.gpus_per_node == 1 else (
        f"a ring over all ranks, {inside:.0f} us a hop in a node and {between:.0f} us between nodes")  # fmt: skip
    return (f"collectives between nodes as NCCL's cost model has them: all-reduce in a tree, all-gather and "
            f"reduce-scatter in {ring}; no SHARP")  # fmt: skip


def _not_looked_at(subject: Subject) -> list[str]:
    engine = subject.config.engine
    sharing = engine.sequence_parallel
    lines = ["all ranks are data-parallel" if sharing == 1 else f"groups of {sharing} neighbouring ranks share rows; "
             "the one with the most items of a micro-step counts, nothing hides their exchange"]  # fmt: skip
    if others := [key for key in engine.deepspeed if key != "zero_optimization"]:
        lines.append(f"of the overlay engine.deepspeed only zero_optimization is looked at, not {', '.join(others)}")
    if engine.compile:
        lines.append("engine.compile: its gain, and what it changes in activations, is not counted")
    if engine.nvme_path is not None:
        lines.append("engine.nvme_path: offloaded states are counted as if they stayed in host memory")
    if engine.optimizer == "muon":
        lines.append("engine.optimizer muon: the products of its iterations are not counted in the update's time")
    return lines
