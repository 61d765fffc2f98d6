"""Weighted or gated sum of modalities, residual add and norm: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trichord_kernels.operands import autocast_is_on
from trichord_kernels.reference.rms_norm import rms_norm

MAX_INPUTS = 8
NORMS = (None, "rms", "layer")


def fuse_modalities(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    *,
    gate_logits: Tensor | None = None,
    present: Tensor | None = None,
    attended: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Literal["rms", "layer"] | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """`z = sum_i w_i * x_i + attended`, then `h = residual + z`, then the norm of h.

    Shapes and dtypes as the public `trichord_kernels.fuse_modalities`; float64 is allowed too and then stays float64.
    Sums are float32 and h is rounded to the inputs' dtype once. The norm reads h as rounded: `rms` rounds like Llama's
    (see `rms_norm`), `layer` like torch's (float32 throughout, the result rounded once). Under autocast everything is
    float32, as torch's own norms are.
    """
    if inputs and autocast_is_on(inputs[0].device.type):
        inputs = [x.float() for x in inputs]
        weights = None if weights is None else [w.float() for w in weights]
        gate_logits, attended, residual = (None if t is None else t.float() for t in (gate_logits, attended, residual))
        norm_weight, norm_bias = (None if t is None else t.float() for t in (norm_weight, norm_bias))
    check_operands(inputs, weights, gate_logits, present, attended, residual, norm, norm_weight, norm_bias)
    h = _mix(inputs, weights, gate_logits, present, attended)
    if residual is not None:
        h = h + residual
    h = h.to(inputs[0].dtype)
    out = h
    if norm == "rms":
        out = rms_norm(h, norm_weight, eps)  # pyright: ignore[reportArgumentType]  checked above
    elif norm == "layer":
        wide = torch.promote_types(h.dtype, torch.float32)
        weight, bias = (None if t is None else t.to(wide) for t in (norm_weight, norm_bias))
        out = F.layer_norm(h.to(wide), h.shape[-1:], weight, bias, eps).to(h.dtype)
    return out if residual is None else (out, h)  # pyright: ignore[reportReturnType]  one tensor without a residual


def _mix(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    gate_logits: Tensor | None,
    present: Tensor | None,
    attended: Tensor | None,
) -> Tensor:
    """z (T, D) in float32, or float64 where the inputs are."""
    wide = torch.promote_types(inputs[0].dtype, torch.float32)
    factors = None
    if gate_logits is not None:
        gates, present = _gates(gate_logits.to(wide), present)
        factors = [gate[:, None] for gate in gates.unbind(1)]
    elif weights is not None:
        factors = [weight.to(wide) for weight in weights]
    z = None if attended is None else attended.to(wide)
    for i, x in enumerate(inputs):
        x = x.to(wide)
        if present is not None:
            x = torch.where(present[:, i, None], x, 0.0)
        if factors is None:
            z = x if z is None else z + x
        else:
            z = x * factors[i] if z is None else torch.addcmul(z, x, factors[i])
    assert z is not None  # there is at least one input
    return z


def _gates(logits: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the present inputs (T, n), all 0 in a row that has none; and which are present: -inf is absent."""
    minus_inf = float("-inf")
    here = logits != minus_inf if present is None else present & (logits != minus_inf)
    masked = logits.masked_fill(~here, minus_inf).masked_fill(~here.any(1, keepdim=True), 0.0)
    return masked.softmax(1) * here, here


def check_operands(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    gate_logits: Tensor | None,
    present: Tensor | None,
    attended: Tensor | None,
    residual: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    """Raise ValueError unless the operands fit together (both paths refuse the same mistakes)."""
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise ValueError(f"fuse_modalities: expected 1 to {MAX_INPUTS} inputs, got {len(inputs)}; fuse in two calls")
    first = inputs[0]
    if first.dim() != 2:
        raise ValueError(f"fuse_modalities: expected inputs (T, D), got {tuple(first.shape)}; flatten the leading axes")
    rows = [(f"inputs[{i}]", x) for i, x in enumerate(inputs)] + [("attended", attended), ("residual", residual)]
    for name, x in rows:
        if x is not None and (x.shape != first.shape or x.dtype != first.dtype):
            raise ValueError(
                f"fuse_modalities: expected {name} like inputs[0], {tuple(first.shape)} {first.dtype}, got "
                f"{tuple(x.shape)} {x.dtype}; cast or project it"
            )
    _check_mix(first, len(inputs), weights, gate_logits, present)
    _check_norm(first, norm, norm_weight, norm_bias)


def _check_mix(
    first: Tensor,
    num_inputs: int,
    weights: Sequence[Tensor] | None,
    gate_logits: Tensor | None,
    present: Tensor | None,
) -> None:
    (num_rows, width), dtypes = first.shape, (first.dtype, torch.float32)
    if weights is not None and gate_logits is not None:
        raise ValueError("fuse_modalities: expected weights or gate_logits, got both; a gate is the weight of its row")
    if weights is not None and len(weights) != num_inputs:
        raise ValueError(f"fuse_modalities: expected one weight per input, {num_inputs}, got {len(weights)}")
    for i, weight in enumerate(weights or ()):
        if tuple(weight.shape) not in ((1,), (width,)) or weight.dtype not in dtypes:
            raise ValueError(
                f"fuse_modalities: expected weights[{i}] of shape (), (1,) or ({width},) in {first.dtype} or float32, "
                f"got {tuple(weight.shape)} {weight.dtype}; reshape or cast it"
            )
    table = (num_rows, num_inputs)
    if gate_logits is not None and (tuple(gate_logits.shape) != table or gate_logits.dtype not in dtypes):
        raise ValueError(
            f"fuse_modalities: expected gate_logits {table} in {first.dtype} or float32, got "
            f"{tuple(gate_logits.shape)} {gate_logits.dtype}; one logit per row and input"
        )
    if present is not None and (tuple(present.shape) != table or present.dtype != torch.bool):
        raise ValueError(
            f"fuse_modalities: expected present {table} in bool, got {tuple(present.shape)} {present.dtype}; one "
            "flag per row and input"
        )


def _check_norm(first: Tensor, norm: str | None, norm_weight: Tensor | None, norm_bias: Tensor | None) -> None:
    if norm not in NORMS:
        raise ValueError(f"fuse_modalities: expected norm None, 'rms' or 'layer', got {norm!r}")
    if (norm is None) != (norm_weight is None) or (norm_bias is not None and norm != "layer"):
        given = ", ".join(n for n, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)) if t is not None)
        raise ValueError(
            f"fuse_modalities: expected norm_weight with a norm, and norm_bias with 'layer' only, got norm {norm!r} "
            f"with {given or 'neither'}; give what the norm takes"
        )
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if t is not None and (t.shape != first.shape[1:] or t.dtype not in (first.dtype, torch.float32)):
            raise ValueError(
                f"fuse_modalities: expected {name} ({first.shape[1]},) in {first.dtype} or float32, got "
                f"{tuple(t.shape)} {t.dtype}; pass the norm's own 1-D {name.removeprefix('norm_')}"
            )
