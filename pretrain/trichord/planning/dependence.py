"""The config keys that a plan's figures follow from, so that a reader of plan.json can tell whether it is still true.

Memory of a rank and the size of a checkpoint: model, rows, objectives, engine. What only says how fast or how long the
run learns is left out, and so is the data: other shards change the time of a step, which only the plan itself tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel

LEAVES = ("encoders", "fusion", "samples", "objectives", "batches", "layers", "engine")
DO_NOT_COUNT = (  # patterns
    "*.weights",
    *(
        f"samples.image.{name}"
        for name in ("resize", "m*", "std", "*_frac", "*_degrees", "*_prob", "*_sigma", "*_flip")
    ),
    *(f"samples.audio.{name}" for name in ("long_clips", "*_frac", "*_db")),
    "samples.text.*",
    "*.rope_theta",
    "objectives.next_token.label_smoothing",
    "objectives.next_token.z_loss",
    *(f"batches.{name}" for name in ("packing", "long_samples", "deal_ranks", "chat*", "label_prompt")),
    *(f"engine.{name}" for name in ("lr", "betas", "eps", "muon*", "weight_decay", "schedule", "decay_steps")),
    *(f"engine.{name}" for name in ("warmup_steps", "min_lr_ratio", "max_grad_norm", "max_bad_steps", "rewinds")),
    *(f"engine.{name}" for name in ("*timeout_s", "stuck_after_s", "zero_init", "rooms", "nvme_path")),
)


def keys_that_count(config: Any) -> dict[str, Any]:
    """Dotted key -> value as JSON, defaults included. Lists and free mappings are one value."""
    found = {path: value for leaf in LEAVES for path, value in _flat(getattr(config, leaf), leaf)}
    return {path: value for path, value in found.items() if not any(fnmatchcase(path, p) for p in DO_NOT_COUNT)}


def _flat(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(part, BaseModel):
        yield path, part
        return
    plain = part.model_dump(mode="json")
    for name in plain:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from _flat(value, f"{path}.{name}")
        else:
            yield f"{path}.{name}", plain[name]
