"""What the same measurement says of today's open kernels: figures to stand beside ours, as data.

Source: one run of the ahead-of-time compiler of Triton 3.8 over tritonbench's copy of Triton's tutorial 06 (`tut`,
bf16, causal), flash-linear-attention's variable-length attention with GQA 32/8 and its Hopper tiles (`fla`; on Ampere
it picks smaller tiles itself, so its sm_80 rows are not what it ships), and Liger's kernels in bf16. Spill bytes came
from ptxas, ours are the local loads and stores in the code. No attention figure of D=128 on sm_100 but those listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowPeer:
    """registers on sm_80, sm_90, sm_100, gfx942; no kernel spills; the rest on sm_90, accesses as "wide/all"."""

    name: str
    registers: tuple[int, int, int, int]
    occupancy: float
    loads: str
    stores: str
    barriers: int


@dataclass(frozen=True)
class AttentionPeer:
    """Spills in bytes per thread over the whole kernel; tensor_core: instructions of the architecture's kind."""

    name: str
    arch: str
    num_warps: int
    num_stages: int
    registers: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_kib: float
    tensor_core: int
    tensor_bound: float | None
    serial_bound: float | None


ROW_PEERS = (
    RowPeer("rms_fwd.4096", (40, 40, 38, 21), 0.75, "4/4", "2/3", 1),
    RowPeer("rms_bwd.4096", (90, 117, 91, 67), 0.25, "6/7", "6/6", 6),
    RowPeer("add_rms_fwd.4096", (40, 40, 40, 23), 0.75, "6/6", "4/5", 1),
    RowPeer("add_rms_bwd.4096", (98, 99, 95, 58), 0.25, "8/9", "6/6", 6),
    RowPeer("ln_fwd.4096", (63, 59, 47, 30), 0.5, "6/6", "2/4", 3),
    RowPeer("ln_bwd.4096", (124, 124, 116, 66), 0.25, "6/8", "10/10", 12),
    RowPeer("rope_fwd.32q8k128", (40, 32, 32, 55), 1.0, "6/10", "4/6", 0),
    RowPeer("rope_bwd.32q8k128", (42, 34, 34, 55), 0.75, "6/10", "4/6", 0),
    RowPeer("mrope_fwd.28q4k128", (44, 48, 48, 62), 0.62, "10/18", "4/6", 0),
    RowPeer("mrope_bwd.28q4k128", (44, 44, 44, 62), 0.62, "10/18", "4/6", 0),
    RowPeer("swiglu_fwd.14336", (44, 36, 40, 40), 0.75, "8/8", "4/4", 0),
    RowPeer("swiglu_bwd.14336", (64, 64, 70, 64), 0.5, "12/12", "8/8", 0),
    RowPeer("ce_fwd.128256", (51, 51, 38, 30), 0.5, "4/6", "4/5", 5),
    RowPeer("ce_grad.128256", (64, 63, 48, 40), 0.5, "8/10", "8/10", 6),
)

ATTENTION_PEERS = (
    AttentionPeer("fla.bwd_dkv.d128", "sm_80", 8, 3, 255, 408, 316, 129.0, 512, 1.0, 0.64),
    AttentionPeer("fla.bwd_dkv.d128", "sm_90", 8, 3, 255, 120, 120, 161.0, 48, 1.0, 0.6),
    AttentionPeer("fla.bwd_dkv.d128", "sm_100", 8, 3, 255, 88, 144, 194.0, 128, None, None),
    AttentionPeer("fla.bwd_dkv.d128.win", "sm_80", 8, 3, 255, 316, 224, 129.0, 512, 1.0, 0.62),
    AttentionPeer("fla.bwd_dkv.d128.win", "sm_90", 8, 3, 255, 20, 28, 161.0, 48, 1.0, 0.57),
    AttentionPeer("fla.bwd_dkv.d64", "sm_80", 8, 3, 255, 60, 60, 65.0, 256, 1.0, 0.57),
    AttentionPeer("fla.bwd_dkv.d64", "sm_90", 8, 3, 255, 0, 0, 81.0, 32, 0.9, 0.47),
    AttentionPeer("fla.bwd_dq.d128", "sm_80", 8, 3, 255, 636, 556, 116.0, 384, 1.0, 0.64),
    AttentionPeer("fla.bwd_dq.d128", "sm_90", 8, 3, 237, 0, 0, 160.0, 40, 1.0, 0.68),
    AttentionPeer("fla.fwd.d128", "sm_80", 8, 3, 251, 0, 0, 96.0, 256, 1.0, 0.62),
    AttentionPeer("fla.fwd.d128", "sm_90", 8, 3, 224, 0, 0, 128.0, 24, 1.0, 0.53),
    AttentionPeer("fla.fwd.d64", "sm_80", 8, 3, 171, 0, 0, 48.0, 128, 1.0, 0.54),
    AttentionPeer("fla.fwd.d64", "sm_90", 8, 3, 133, 0, 0, 64.0, 16, 0.67, 0.4),
    AttentionPeer("tut.bwd.d128.w4s5", "sm_80", 4, 5, 32, 23492, 25108, 107.0, 672, 0.53, 0.35),
    AttentionPeer("tut.bwd.d128.w4s5", "sm_90", 4, 5, 255, 1920, 1956, 145.0, 146, 1.0, 0.58),
    AttentionPeer("tut.bwd.d128.w8s3", "sm_80", 8, 3, 255, 376, 372, 92.5, 1120, 1.0, 0.64),
    AttentionPeer("tut.bwd.d128.w8s3", "sm_90", 8, 3, 228, 0, 0, 112.5, 73, 1.0, 0.66),
    AttentionPeer("tut.bwd.d128.w8s3", "sm_100", 8, 3, 162, 0, 0, 128.6, 210, None, None),
    AttentionPeer("tut.bwd.d64.w4s5", "sm_80", 4, 5, 255, 244, 232, 55.0, 672, 1.0, 0.63),
    AttentionPeer("tut.bwd.d64.w4s5", "sm_90", 4, 5, 255, 68, 68, 73.0, 82, 1.0, 0.62),
    AttentionPeer("tut.bwd.d64.w4s5", "sm_100", 4, 5, 178, 4, 4, 81.1, 114, None, None),
    AttentionPeer("tut.bwd.d64.w8s2", "sm_80", 8, 2, 255, 16, 16, 44.2, 336, 1.0, 0.69),
    AttentionPeer("tut.bwd.d64.w8s2", "sm_90", 8, 2, 168, 0, 0, 48.2, 104, 1.0, 0.57),
    AttentionPeer("tut.bwd.d64.w8s3", "sm_80", 8, 3, 255, 20, 20, 48.5, 336, 1.0, 0.66),
    AttentionPeer("tut.bwd.d64.w8s3", "sm_90", 8, 3, 176, 0, 0, 56.5, 174, 1.0, 0.55),
    AttentionPeer("tut.bwd.d64.w8s3", "sm_100", 8, 3, 118, 0, 0, 64.6, 114, None, None),
    AttentionPeer("tut.fwd.d128.causal.128x128w8", "sm_80", 8, 3, 255, 36, 36, 160.0, 512, 1.0, 0.69),
    AttentionPeer("tut.fwd.d128.causal.128x128w8", "sm_90", 8, 3, 255, 0, 0, 224.0, 32, 1.0, 0.66),
    AttentionPeer("tut.fwd.d128.causal.128x64w8", "sm_80", 8, 3, 218, 0, 0, 96.0, 256, 1.0, 0.66),
    AttentionPeer("tut.fwd.d128.causal.128x64w8", "sm_90", 8, 3, 185, 0, 0, 128.0, 24, 1.0, 0.59),
    AttentionPeer("tut.fwd.d64.causal.128x64w4", "sm_80", 4, 3, 255, 0, 0, 48.0, 256, 1.0, 0.6),
    AttentionPeer("tut.fwd.d64.causal.128x64w4", "sm_90", 4, 3, 255, 0, 0, 64.0, 32, 0.94, 0.48),
    AttentionPeer("tut.fwd.d64.causal.128x64w4", "sm_100", 4, 3, 255, 64, 64, 65.0, 36, None, None),
    AttentionPeer("tut.fwd.d64.causal.128x64w8", "sm_80", 8, 3, 154, 0, 0, 48.0, 128, 1.0, 0.59),
    AttentionPeer("tut.fwd.d64.causal.128x64w8", "sm_90", 8, 3, 127, 0, 0, 64.0, 16, 0.87, 0.46),
    AttentionPeer("tut.fwd.d64.causal.128x64w8", "sm_100", 8, 3, 140, 0, 0, 65.0, 36, None, None),
)

# Our case -> Liger's kernel of the same work and size. Of linear + cross-entropy, the pass over a chunk of logits.
ROW_PAIRS = {
    "rms_norm_fwd.4096.bf16": "rms_fwd.4096",
    "rms_norm_bwd.4096.bf16": "rms_bwd.4096",
    "add_rms_norm_fwd.4096.bf16": "add_rms_fwd.4096",
    "add_rms_norm_bwd.4096.bf16": "add_rms_bwd.4096",
    "rope_fwd.32q8k128.bf16": "rope_fwd.32q8k128",
    "rope_bwd.32q8k128.bf16": "rope_bwd.32q8k128",
    "rope_fwd.28q4k128.3axes.bf16": "mrope_fwd.28q4k128",
    "rope_bwd.28q4k128.3axes.bf16": "mrope_bwd.28q4k128",
    "linear_cross_entropy_fwd.128256.bf16": "ce_fwd.128256",
    "linear_cross_entropy_bwd.128256.bf16": "ce_grad.128256",
}
_ROW_ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")


def peer_rows(row: dict) -> list[dict]:
    """The peers' figures to print under one row of the report, in its keys; none for kernels without a peer.

    An attention kernel's peers are those of its direction, head dim and architecture.
    """
    if row.get("head_dim") is None:
        name = ROW_PAIRS.get(row["kernel"])
        return [_row_figures(peer, row["arch"]) for peer in ROW_PEERS if peer.name == name]
    prefixes = ("fwd.",) if row["is_forward"] else ("bwd.", "bwd_dq.", "bwd_dkv.")
    wanted = tuple(f"{suite}.{prefix}d{row['head_dim']}" for suite in ("tut", "fla") for prefix in prefixes)
    return [
        _attention_figures(peer)
        for peer in ATTENTION_PEERS
        if peer.arch == row["arch"] and _starts_with_part(peer.name, wanted)
    ]


def _starts_with_part(name: str, starts: Sequence[str]) -> bool:
    return any(name == start or name.startswith(f"{start}.") for start in starts)


def _row_figures(peer: RowPeer, arch: str) -> dict:
    figures = {"kernel": f"Liger {peer.name}", "arch": arch, "registers": peer.registers[_ROW_ARCHS.index(arch)]}
    figures |= {"spill_store_bytes": 0, "spill_load_bytes": 0}
    if arch == "sm_90":
        figures |= {"occupancy": peer.occupancy, "loads": peer.loads, "stores": peer.stores, "barriers": peer.barriers}
    return figures


def _attention_figures(peer: AttentionPeer) -> dict:
    return {
        "kernel": peer.name,
        "arch": peer.arch,
        "num_warps": peer.num_warps,
        "registers": peer.registers,
        "spill_store_bytes": peer.spill_store_bytes,
        "spill_load_bytes": peer.spill_load_bytes,
        "shared_kib": peer.shared_kib,
        "tensor_core": {"": peer.tensor_core},
        "tensor_bound": peer.tensor_bound,
        "serial_bound": peer.serial_bound,
    }
