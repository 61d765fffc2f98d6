"""GPUs by name, as their makers state them, and the links between them.

Sources: NVIDIA data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU" (dense rates are half
of the sparse ones printed there), "DGX B200"; AMD data sheet "Instinct MI300X". memory_gib is what the driver reports
for the card. Links: NVLink 3, 4, 5 are printed with both directions summed, 600, 900, 1,800 GB/s; MI300X has seven
Infinity Fabric links of 128 GB/s to its peers, both directions summed.

The shares of the peak that kernels reach are assumptions, not data sheet facts. `products`: large bf16 matrix products
as published for cuBLAS (the H100 stays near two thirds of its peak under its power limit, the A100 near
three quarters).
`attention`: Triton kernels near 400 TFLOP/s on H100, forward and backward together (FlashAttention-3, Shah et al. 2024,
figure 5). `memory`: copies reach 85 to 92 % of the printed bandwidth, many short kernels less. They are to be replaced
by `trichord bench kernels` of the machine in question.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from trichord.core.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """bf16_tflops, fp32_tflops: dense peaks in TFLOP/s, fp32 without TF32. memory_gb_per_s, link_gb_per_s (to the other
    GPUs of its node, one direction): GB/s. network_gb_per_s: the card that a GPU usually has to other nodes. products,
    attention, memory: assumed shares of the peaks."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    products: float
    attention: float
    memory: float = 0.75


CATALOG = {
    "a100-40": Gpu("NVIDIA A100 SXM 40GB", 39.4, 312.0, 19.5, 1555.0, 300.0, 25.0, 0.75, 0.45),
    "a100-80": Gpu("NVIDIA A100 SXM 80GB", 79.2, 312.0, 19.5, 2039.0, 300.0, 25.0, 0.75, 0.45),
    "h100": Gpu("NVIDIA H100 SXM 80GB", 79.6, 989.0, 67.0, 3350.0, 450.0, 50.0, 0.65, 0.35),
    "h200": Gpu("NVIDIA H200 SXM 141GB", 140.4, 989.0, 67.0, 4800.0, 450.0, 50.0, 0.65, 0.35),
    "b200": Gpu("NVIDIA B200 SXM 180GB", 178.0, 2250.0, 75.0, 8000.0, 900.0, 50.0, 0.65, 0.30),
    "mi300x": Gpu("AMD Instinct MI300X 192GB", 191.9, 1307.0, 163.4, 5300.0, 448.0, 50.0, 0.50, 0.25),
}


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError for a name that is not in the catalog, with the nearest one."""
    key = name.lower().replace("_", "-")
    if key not in CATALOG:
        near = difflib.get_close_matches(key, CATALOG, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--gpu {name}: expected one of {', '.join(CATALOG)}{hint}")
    return CATALOG[key]


@dataclass(frozen=True)
class Fabric:
    """Links of a job. node_gb_per_s: from one node to the others, all cards together; share: of the printed bandwidth
    that a collective reaches; alphas: latency of a hop inside a node that is alone and between nodes. In a ring over
    several nodes hops are pipelined: 1 us for one inside a node (what the network's proxy takes for each), 3 us between
    nodes, as NCCL reckons with for its low-latency protocols (hwLat, getNetOverhead in src/graph/tuning.cc: 0.6 to 1.9
    and 2.7 to 4 us)."""

    gpus_per_node: int
    link_gb_per_s: float
    node_gb_per_s: float
    share: float = 0.8
    alpha_inside_s: float = 3e-6
    alpha_between_s: float = 10e-6
    alpha_ring_inside_s: float = 1e-6
    alpha_ring_between_s: float = 3e-6

    @classmethod
    def of(cls, gpu: Gpu, gpus_per_node: int = 8, node_gb_per_s: float | None = None) -> Fabric:
        return cls(gpus_per_node, gpu.link_gb_per_s, node_gb_per_s or gpu.network_gb_per_s * gpus_per_node)

    def ring_bytes_per_s(self, nodes: int) -> float:
        """What one GPU of a ring sends per second. Between nodes, the rings of a node's GPUs share its cards, each ring
        with its part of the data, so the whole of the node's network counts."""
        slowest = self.link_gb_per_s if nodes == 1 else min(self.link_gb_per_s, self.node_gb_per_s)
        return 1e9 * self.share * slowest

    def own_bytes_per_s(self) -> float:
        """What one GPU sends to other nodes per second while all GPUs of its node do: an all-to-all."""
        return 1e9 * self.share * min(self.link_gb_per_s, self.node_gb_per_s / self.gpus_per_node)
