"""`trichord_kernels.linear_cross_entropy`."""

from __future__ import annotations

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, through_op
from trichord_kernels.operands import require_floats, require_integers, require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import linear_cross_entropy as op


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_labelled: int | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T + bias` against `labels`, without ever holding all logits.

    hidden (T, D), weight (V, D), bias (V,): float32, bfloat16 or float16, one dtype, any strides; labels (T,) int64.
    Per row with a label: token_weights[t] * (cross-entropy + z_loss * lse^2) of the logits, which are
    softcap * tanh(logits / softcap) where a softcap is given. label_smoothing is torch's. reduction "none": (T,), 0 at
    rows without a label; "sum"; "mean": over the token weights of rows with a label, or their count. float32.

    Rows whose label is ignore_index are dropped before the matrix product: on a CPU always; on a GPU where the host
    says how many others there are, `num_labelled` (more is allowed), since it may not wait for the device to learn it.
    None on a GPU: all rows. If there are more labels than `num_labelled`, the loss is NaN on a GPU.
    Under autocast the products run in autocast's dtype, the loss in float32.

    Differentiable, once, in hidden, weight, bias and token_weights. Raises ValueError for operands that do not fit, on
    a CPU also for a label outside the vocabulary (on a GPU the loss of that row is NaN); KernelError for a GPU case the
    kernel does not cover.
    """
    required = {"hidden": hidden, "weight": weight, "labels": labels}
    require_tensors("linear_cross_entropy", required, {"bias": bias, "token_weights": token_weights})
    require_floats("linear_cross_entropy", "hidden", hidden)
    require_integers("linear_cross_entropy", ignore_index=ignore_index, num_labelled=num_labelled)
    # The twin reads on the host how many rows have a label.
    run = op.linear_cross_entropy if through_op(hidden.device) else reference.linear_cross_entropy
    return run(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        token_weights=token_weights,
        reduction=reduction,
        num_labelled=num_labelled,
    )
