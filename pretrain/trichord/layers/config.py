"""Config of the layers room: which implementation of the fused operations runs."""

from typing import Literal

from trichord.core.leaf import Leaf

KernelChoice = Literal["auto", "triton", "reference"]


class LayersConfig(Leaf):
    """Kernel selection. TRICHORD_KERNELS in the environment overrides it."""

    kernels: KernelChoice = "auto"
    """auto: Triton on a GPU, plain torch elsewhere."""
