"""Fused kernels for multimodal pretraining. Needs torch and triton only.

The public names are `__all__`. `trichord_kernels.reference` holds the plain-torch twins under the same names and
signatures: they are the definition of correct, and what runs on a CPU.

Importing this package imports neither torch nor triton; the first use of a public name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trichord_kernels.functional.attention import attention
    from trichord_kernels.functional.contrastive_loss import contrastive_loss
    from trichord_kernels.functional.fuse_modalities import fuse_modalities
    from trichord_kernels.functional.gated_cross_attention import gated_cross_attention
    from trichord_kernels.functional.linear_cross_entropy import linear_cross_entropy
    from trichord_kernels.functional.merge_embeddings import merge_embeddings
    from trichord_kernels.functional.rms_norm import rms_norm
    from trichord_kernels.functional.rope import rope
    from trichord_kernels.mel import log_mel, num_mel_frames

__all__ = [
    "attention",
    "contrastive_loss",
    "fuse_modalities",
    "gated_cross_attention",
    "linear_cross_entropy",
    "log_mel",
    "merge_embeddings",
    "num_mel_frames",
    "rms_norm",
    "rope",
]

_HOME = {
    "attention": "trichord_kernels.functional.attention",
    "contrastive_loss": "trichord_kernels.functional.contrastive_loss",
    "fuse_modalities": "trichord_kernels.functional.fuse_modalities",
    "gated_cross_attention": "trichord_kernels.functional.gated_cross_attention",
    "linear_cross_entropy": "trichord_kernels.functional.linear_cross_entropy",
    "merge_embeddings": "trichord_kernels.functional.merge_embeddings",
    "rms_norm": "trichord_kernels.functional.rms_norm",
    "rope": "trichord_kernels.functional.rope",
    "log_mel": "trichord_kernels.mel",
    "num_mel_frames": "trichord_kernels.mel",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its public names are {__all__}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next access is a plain attribute, also for torch.compile
    return value
