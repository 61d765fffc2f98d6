"""`trichord_kernels.fuse_modalities`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, choose_backend
from trichord_kernels.operands import require_floats, require_not_negative, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import fuse_modalities as op


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
    """Several modalities become one stream, and go on through a residual add and a norm, each row read once.

    `z = sum_i w_i * x_i (+ attended)`; `h = residual + z`; `out = norm(h)`. So `z = w1*x + w2*y + Att(x, y)` is
    `fuse_modalities((x, y), (w1, w2), attended=att)`.

    inputs: 1 to 8 tensors (T, D) float32, bfloat16 or float16, any strides. The factor of each is one of
    - `weights`, one per input, each (), (1,) or (D,), in the inputs' dtype or float32;
    - `gate_logits` (T, n), in the inputs' dtype or float32: softmax over the inputs that are present in the row (one
      alone has factor 1); a logit of -inf means absent;
    - 1, with neither.
    present (T, n) bool: an input that is absent in a row adds 0 there, has gradient 0 there, and its values do not
    matter (NaN neither); in a row without any, the mixed part is 0. attended, residual (T, D) like the inputs.
    norm over D: `rms` or `layer`, with norm_weight (D,) and, for `layer`, norm_bias (D,) or None.

    Returns out (T, D), or (out, h) with a residual, in the inputs' dtype; with a residual and no norm both are the same
    tensor. Sums and statistics are float32, h is rounded once; see `reference/fuse_modalities.py`. Differentiable in
    every floating-point tensor. Raises ValueError for operands that do not fit, KernelError for a GPU case the kernel
    does not cover.
    """
    inputs, weights = list(inputs), None if weights is None else list(weights)
    optional = {"gate_logits": gate_logits, "present": present, "attended": attended, "residual": residual}
    optional |= {f"weights[{i}]": weight for i, weight in enumerate(weights or ())}
    require_tensors("fuse_modalities", {f"inputs[{i}]": x for i, x in enumerate(inputs)}, optional)
    if inputs:
        require_floats("fuse_modalities", "inputs[0]", inputs[0])
    require_not_negative("fuse_modalities", eps=eps)
    weights = None if weights is None else [weight.reshape(1) if weight.dim() == 0 else weight for weight in weights]
    run = reference.fuse_modalities
    if inputs and choose_backend(inputs[0].device) == "triton":
        run = op.fuse_modalities
    return run(
        inputs,
        weights,
        gate_logits=gate_logits,
        present=present,
        attended=attended,
        residual=residual,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
    )
