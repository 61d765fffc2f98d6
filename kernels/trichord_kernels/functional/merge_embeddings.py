"""`trichord_kernels.merge_embeddings`."""

from __future__ import annotations

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, through_op
from trichord_kernels.operands import require_tensors

if HAS_TRITON:
    from trichord_kernels.ops import merge_embeddings as op


def merge_embeddings(embeds: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Feature rows take their places in a stream of embeddings: `out[positions[m]] = features[m]`, else `embeds`.

    embeds (T, D) float32, bfloat16 or float16; features (M, D) in the same dtype; positions (M,) int32 or int64, on the
    same device, any strides. A position below 0 means that this row is not placed (its gradient is 0). Positions are
    distinct and below T: on a CPU anything else raises ValueError; on a GPU, where reading them would wait for the
    device, one of T or more stops the device by an assertion, and of features that share a place any one may win.
    Returns out (T, D), new memory. Differentiable in embeds and features, exactly: rows are moved, nothing is added.
    Raises ValueError for operands that do not fit, KernelError for a GPU case the kernel does not cover.
    """
    require_tensors("merge_embeddings", {"embeds": embeds, "features": features, "positions": positions})
    if through_op(embeds.device):
        return op.merge_embeddings(embeds, features, positions)
    return reference.merge_embeddings(embeds, features, positions)
