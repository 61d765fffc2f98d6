"""Learning-rate multipliers as pure functions of the step."""

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def lr_multiplier(
    name: ScheduleName, step: int, *, warmup_steps: int, total_steps: int, min_ratio: float = 0.0
) -> float:
    """Factor on the base learning rate for optimizer step `step` (0-based).

    Linear warm-up from 1/warmup_steps to 1, then: `constant` stays 1; `linear` and `cosine` (SGDR, Loshchilov and
    Hutter 2017, eq. 5, one cycle) fall to `min_ratio` at `total_steps`. Past `total_steps` the last value holds.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    decay = 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_ratio + (1.0 - min_ratio) * decay
