"""What the static judge compiles: per op, one case per kernel, dtype, size and variant, as its launcher launches it.

An op adds its file here in the same change that adds its kernels.
"""

from __future__ import annotations

from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.cases import (
    attention,
    contrastive_loss,
    fuse_modalities,
    linear_cross_entropy,
    merge_embeddings,
    rms_norm,
    rope,
)

_OPS = (attention, rms_norm, linear_cross_entropy, fuse_modalities, merge_embeddings, rope, contrastive_loss)
_BY_NAME = {op.__name__.rpartition(".")[2]: op for op in _OPS}


def op_names() -> tuple[str, ...]:
    return tuple(_BY_NAME)


def op_cases(op: str, arch: str) -> list[StaticCase]:
    """Every case of one op on one architecture (`sm_90`): tile sizes may differ between them."""
    return _BY_NAME[op].cases(arch)


def static_cases(arch: str) -> list[StaticCase]:
    return [case for op in op_names() for case in op_cases(op, arch)]
