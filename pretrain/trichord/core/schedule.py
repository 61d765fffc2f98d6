"""Learning-rate multipliers as pure functions of the step."""

import math
from collections.abc import Callable
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


def lr_multiplier(
    name: ScheduleName,
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.0,
    decay_steps: int | None = None,
) -> float:
    """Factor on the base learning rate for optimizer step `step` (0-based).

    Linear warm-up from 1/warmup_steps to 1, then: `constant` stays 1; `linear` and `cosine` (SGDR, Loshchilov and
    Hutter 2017, eq. 5, one cycle) fall to `min_ratio` at `total_steps`; `wsd` (warm-up, stable, decay) stays 1 and
    falls over the last `decay_steps` (None: a fifth of all) by 1 - sqrt of their progress (Haegele et al. 2024, eq. 1).
    Past `total_steps` the last value holds.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    falls_from = warmup_steps
    if name == "wsd":
        length = max(1, total_steps // 5) if decay_steps is None else decay_steps
        falls_from = max(warmup_steps, total_steps - length)
    progress = min(1.0, max(0.0, (step - falls_from) / max(1, total_steps - falls_from)))
    return min_ratio + (1.0 - min_ratio) * _FALLS[name](progress)


_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "wsd": lambda progress: 1.0 - math.sqrt(progress),
}
