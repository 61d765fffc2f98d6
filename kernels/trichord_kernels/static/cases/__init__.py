"""What the static judge compiles: per op, one case per kernel, dtype, size and variant, as its launcher launches it.

An op adds its file here in the same change that adds its kernels.
"""

from __future__ import annotations

from trichord_kernels.static.case import StaticCase
from trichord_kernels.static.cases import rms_norm

_OPS = (rms_norm,)


def static_cases(arch: str) -> list[StaticCase]:
    """Every case of every op on one architecture (`sm_90`): tile sizes may differ between them."""
    return [case for op in _OPS for case in op.cases(arch)]
