"""One launch choice, and which architecture a device is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """block_m x block_n elements that a program holds at a time (what they are, the op says), its warps, the stages of
    its load pipeline, and where the choice comes from: `static: ...` (compiled code) or `swept on NAME, DATE`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    source: str


def arch_of(device: torch.device) -> str:
    """`sm_90`, `gfx942`, ...; `cpu` for a CPU, where the interpreter runs the kernels."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
