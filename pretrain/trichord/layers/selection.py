"""Which implementation of the fused operations runs."""

from __future__ import annotations

import os
from typing import get_args

from trichord.core.errors import ConfigError
from trichord.layers.config import KernelChoice

ENVIRONMENT = "TRICHORD_KERNELS"
CHOICES: tuple[KernelChoice, ...] = get_args(KernelChoice)


def select_kernels(choice: str) -> None:
    """Make `layers.kernels` hold for this process, unless the environment says something already.

    choice: auto (by device, the kernels' own default), triton or reference.

    Raises:
        ConfigError: the environment says another word.
    """
    said = os.environ.get(ENVIRONMENT, "auto")
    if said not in CHOICES:
        raise ConfigError(f"{ENVIRONMENT}: expected one of {', '.join(CHOICES)}, got {said!r}; set it or unset it")
    if choice != "auto":
        os.environ.setdefault(ENVIRONMENT, choice)
