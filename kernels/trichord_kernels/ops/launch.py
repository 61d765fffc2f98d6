"""What every row kernel's launcher needs: a (rows, D) view, its stride unit, and a device the kernel can run on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from trichord_kernels.errors import KernelError

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Kernels take row strides in units of 8 elements where they can: the compiler then knows that each row starts on a
# 16-byte boundary. Left alone, Triton only learns of multiples of 16 and reads rows of 4104 elements piecemeal.
STRIDE_UNIT = 8


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (rows, D) with last stride 1: a view where the strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def stride_unit(*tensors: Tensor | None) -> int:
    """STRIDE_UNIT if every row stride is a multiple of it, else 1."""
    return 1 if any(t is not None and t.stride(0) % STRIDE_UNIT for t in tensors) else STRIDE_UNIT


def check_row_operands(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise KernelError unless x has a dtype the kernels take and all operands are on its device."""
    if x.dtype not in KERNEL_DTYPES:
        raise KernelError(
            f"{op}: the Triton kernel takes float32, bfloat16 and float16, got {x.dtype}; cast, or set "
            "TRICHORD_KERNELS=reference"
        )
    devices = {str(t.device) for t in (x, *others) if t is not None}
    if len(devices) != 1:
        raise KernelError(f"{op}: expected all tensors on one device, got {', '.join(sorted(devices))}; move them")


def on_device(op: str, kernel: Any, x: Tensor) -> AbstractContextManager:
    """The context to launch `kernel` in for tensors on x's device. Raises KernelError where it cannot run there."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    if x.device.type == "cpu" and not isinstance(kernel, triton.JITFunction):
        return nullcontext()  # the interpreter
    hint = "set TRITON_INTERPRET=1 before the first import of triton" if x.device.type == "cpu" else "move the tensors"
    raise KernelError(
        f"{op}: expected tensors on a GPU for the Triton kernel, got {x.device.type}; {hint}, or set "
        "TRICHORD_KERNELS=reference"
    )
