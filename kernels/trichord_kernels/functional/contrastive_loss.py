"""`trichord_kernels.contrastive_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from trichord_kernels import reference
from trichord_kernels.dispatch import HAS_TRITON, through_op
from trichord_kernels.operands import require_tensors
from trichord_kernels.reference.contrastive_gradients import ContrastiveGradients

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

if HAS_TRITON:
    from trichord_kernels.ops import contrastive_loss as op


@overload
def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "infonce",
    symmetric: bool = True,
    query_groups: Tensor | None = None,
    target_groups: Tensor | None = None,
    query_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_gradients: Literal[False] = False,
) -> Tensor: ...
@overload
def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "infonce",
    symmetric: bool = True,
    query_groups: Tensor | None = None,
    target_groups: Tensor | None = None,
    query_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_gradients: Literal[True],
) -> tuple[Tensor, ContrastiveGradients]: ...
def contrastive_loss(
    queries: Tensor,
    targets: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    kind: str = "infonce",
    symmetric: bool = True,
    query_groups: Tensor | None = None,
    target_groups: Tensor | None = None,
    query_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_gradients: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveGradients]:
    """Contrastive loss of queries (R, E) and targets (C, E), never holding the R x C logits s_ij = scale * q_i . t_j.

    infonce: sum over queries of -1/|P_i| sum over positives of log softmax_j(s_ij) (supervised contrastive, Khosla et
    al. 2020, eq. 2); `symmetric` (R = C, row i of both is one sample): half of that plus half of the same over targets,
    with s transposed. logit_bias would cancel and is left out (its gradient is 0). sigmoid: -sum over all pairs of
    log sigmoid(z_ij (s_ij + bias)), z = +1 for positives and -1 otherwise (SigLIP, Zhai et al. 2023, eq. 1);
    `symmetric` changes nothing.

    Features: float32, bfloat16 or float16, one dtype, any strides (normalise them yourself). logit_scale, logit_bias:
    () or (1,), used as they are: give the exponential of a scale that is learned as a logarithm (CLIP).
    query_groups (R,), target_groups (C,) int64: slots of equal groups are positives of each other; without them
    query i and target i are. query_valid (R,), target_valid (C,) bool: a slot that is not valid is neither row nor
    candidate, whatever its features hold (NaN, too). A row without positives has loss 0 and no gradient.

    group: the candidates are those of all its ranks, in rank order (equal R and equal C on all). Every rank calls this,
    and backward, together; the sum of the ranks' losses is the loss of their concatenation. Gradients by the features
    are those of that sum, complete. The scalars' gradients are this rank's share (data parallelism adds shares up). Not
    inside torch.compile.

    Returns () float32: the sum over (this rank's) rows, differentiable, once, in the features and scalars. With
    `return_gradients` (loss, ContrastiveGradients) at once, not differentiable; its scalars are complete, too. Under
    autocast features are taken to float32, as torch does for losses. Products are float32 for float32 features
    (no TF32), sums always. Raises ValueError for operands that do not fit, KernelError for a GPU case the kernel does
    not cover.
    """
    required = {"queries": queries, "targets": targets, "logit_scale": logit_scale}
    optional = {"logit_bias": logit_bias, "query_groups": query_groups, "target_groups": target_groups}
    optional |= {"query_valid": query_valid, "target_valid": target_valid}
    require_tensors("contrastive_loss", required, optional)
    # The twin loops over blocks: inside a graph it goes through the opaque op instead.
    run = op.contrastive_loss if through_op(queries.device) else reference.contrastive_loss
    return run(
        queries,
        targets,
        logit_scale,
        logit_bias,
        kind=kind,
        symmetric=symmetric,
        query_groups=query_groups,
        target_groups=target_groups,
        query_valid=query_valid,
        target_valid=target_valid,
        group=group,
        return_gradients=return_gradients,
    )
