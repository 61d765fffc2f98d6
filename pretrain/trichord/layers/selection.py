"""Which implementation of the fused operations runs."""

from __future__ import annotations

import os

ENVIRONMENT = "TRICHORD_KERNELS"


def select_kernels(choice: str) -> None:
    """Make `layers.kernels` hold for this process, unless the environment says something already.

    choice: auto (by device, the kernels' own default), triton or reference.
    """
    if choice != "auto":
        os.environ.setdefault(ENVIRONMENT, choice)
