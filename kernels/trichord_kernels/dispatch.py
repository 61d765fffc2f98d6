"""Which implementation runs: the Triton kernel on a GPU, the plain-torch twin on a CPU.

`TRICHORD_KERNELS` overrides the choice: `auto` (by device, the default), `triton`, `reference`. A GPU case that a
kernel does not cover raises `KernelError`; nothing falls back in silence.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from trichord_kernels.errors import KernelError

HAS_TRITON = find_spec("triton") is not None  # absent off Linux, where the reference is all there is

BACKENDS = ("auto", "triton", "reference")


def requested_backend() -> str:
    """The value of TRICHORD_KERNELS (default `auto`). Raises KernelError for a word that is no backend."""
    value = os.environ.get("TRICHORD_KERNELS", "auto")
    if value not in BACKENDS:
        raise KernelError(f"TRICHORD_KERNELS: expected one of {', '.join(BACKENDS)}, got {value!r}; set it or unset it")
    return value


def choose_backend(device: torch.device) -> str:
    """`triton` or `reference` for tensors on `device`. Raises KernelError if Triton is wanted but not installed."""
    requested = requested_backend()
    if requested == "reference" or (requested == "auto" and device.type in ("cpu", "meta")):
        return "reference"
    if not HAS_TRITON:
        raise KernelError(
            f"expected triton for tensors on {device.type} (TRICHORD_KERNELS={requested}), but it is not installed; "
            "pip install triton, or set TRICHORD_KERNELS=reference"
        )
    return "triton"


def through_op(device: torch.device) -> bool:
    """Whether an op whose reference reads sizes on the host goes through its registered op on `device`.

    Always for Triton; else where there are no values to read: in a graph being traced, and on the meta device.
    """
    if choose_backend(device) != "reference":
        return True
    return HAS_TRITON and (torch.compiler.is_compiling() or device.type == "meta")
