"""The plain-torch twins: same names and signatures as the public ops, on any device and dtype."""

from trichord_kernels.mel import log_mel
from trichord_kernels.reference.attention import attention
from trichord_kernels.reference.contrastive_loss import contrastive_loss
from trichord_kernels.reference.fuse_modalities import fuse_modalities
from trichord_kernels.reference.gated_cross_attention import gated_cross_attention
from trichord_kernels.reference.linear_cross_entropy import linear_cross_entropy
from trichord_kernels.reference.merge_embeddings import merge_embeddings
from trichord_kernels.reference.rms_norm import rms_norm
from trichord_kernels.reference.rope import rope

__all__ = [
    "attention",
    "contrastive_loss",
    "fuse_modalities",
    "gated_cross_attention",
    "linear_cross_entropy",
    "log_mel",
    "merge_embeddings",
    "rms_norm",
    "rope",
]
