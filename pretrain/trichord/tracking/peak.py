"""What a GPU can compute at best: FLOP/s of its matrix units, without sparsity, by name and kind of number. No torch.

The figures are the vendors' own for dense products; a card with another power limit or clock reaches less. Where a
vendor gives a figure with sparsity only, half of it stands here.
"""

from __future__ import annotations

import re
from typing import Literal

Number = Literal["bf16", "fp16", "tf32", "fp32"]

_T = 1e12
# (pattern on the name that the driver reports, in this order; TFLOP/s by kind of number)
_PEAKS: tuple[tuple[str, dict[Number, float]], ...] = (
    # NVIDIA Blackwell: HGX B200/B100 and GB200 data sheets (2024): bf16 4.5, 3.5 and 5 PFLOP/s with sparsity.
    (r"GB200", {"bf16": 2500, "fp16": 2500, "tf32": 1250, "fp32": 80}),
    (r"B200", {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75}),
    (r"B100", {"bf16": 1750, "fp16": 1750, "tf32": 875, "fp32": 60}),
    # NVIDIA Hopper: H100 data sheet (2023) and H100 white paper, table 3; H200 and GH200 have the SXM's cores.
    (r"H100 NVL|H200 NVL", {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60}),
    (r"H100 PCIe", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51}),
    (r"GH200|H200|H100", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    # NVIDIA Ada: L40S, L40 and L4 data sheets (2023); RTX 4090 with fp32 sums: Ada white paper, table 2.
    (r"L40S", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    (r"L40\b", {"bf16": 181, "fp16": 181, "tf32": 90.5, "fp32": 90.5}),
    (r"\bL4\b", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    (r"RTX 4090", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    # NVIDIA Ampere: A100, A40, A30, A10 and RTX A6000 data sheets (2020-2021); RTX 3090: GA102 white paper, fp32 sums.
    (r"A100", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    (r"\bA40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"\bA30\b", {"bf16": 165, "fp16": 165, "tf32": 82, "fp32": 10.3}),
    (r"\bA10\b", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"RTX A6000", {"bf16": 154.8, "fp16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    (r"RTX 3090(?! Ti)", {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6}),
    # NVIDIA Turing and Volta: T4 and V100 data sheets (2018-2020). No bf16, no tf32.
    (r"\bT4\b", {"fp16": 65, "fp32": 8.1}),
    (r"V100-PCIE", {"fp16": 112, "fp32": 14}),
    (r"V100", {"fp16": 125, "fp32": 15.7}),
    # AMD: MI300X, MI250X and MI210 data sheets (2021-2023). A process sees one of an MI250X's two dies: half of it.
    (r"MI300X|MI325X", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4}),
    (r"MI250X", {"bf16": 191.5, "fp16": 191.5, "fp32": 47.9}),
    (r"MI210", {"bf16": 181, "fp16": 181, "fp32": 45.3}),
)


def peak_flops_per_s(gpu: str, number: Number) -> float | None:
    """Peak FLOP/s of a GPU for products of `number`; None: not in the table, or it has no units for it.

    gpu: the name that the driver reports ("NVIDIA H100 80GB HBM3"), or a short one ("h100").
    """
    for pattern, peaks in _PEAKS:
        if re.search(pattern, gpu, re.IGNORECASE):
            found = peaks.get(number)
            return None if found is None else found * _T
    return None


def number_of(precision: str, *, allow_tf32: bool) -> Number:
    """In which kind of number a run's matrix products are, by `engine.precision`."""
    if precision in ("bf16", "autocast_bf16"):
        return "bf16"
    if precision == "fp16":
        return "fp16"
    return "tf32" if allow_tf32 else "fp32"
