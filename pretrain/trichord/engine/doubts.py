"""What of the engine's config is valid, and probably not meant: keys that have no effect, schedules cut off by the run.

Told once, and never refused: a short trial of a long run, or another optimizer for a comparison, has such keys, too.
"""

from __future__ import annotations

from collections.abc import Iterator

from trichord.engine.config import EngineConfig, MuonConfig


def doubts(engine: EngineConfig, max_steps: int | None) -> list[str]:
    """One line for each. max_steps: of the run; None: not yet counted."""
    return [*_idle(engine), *(_cut_off(engine, max_steps) if max_steps is not None else ())]


def _idle(engine: EngineConfig) -> Iterator[str]:
    """Keys set to something else than their default that nothing reads."""
    schedules = {engine.schedule, *(rates.schedule for rates in engine.rooms.values())}
    default = EngineConfig.model_fields
    if engine.decay_steps is not None and "wsd" not in schedules:
        yield f"engine.decay_steps has no effect with engine.schedule {engine.schedule}: it is for wsd"
    if engine.muon != MuonConfig() and engine.optimizer != "muon":
        yield f"engine.muon has no effect with engine.optimizer {engine.optimizer}"
    if engine.momentum != default["momentum"].default and engine.optimizer not in ("sgd", "rmsprop"):
        here = "; set engine.muon.momentum" if engine.optimizer == "muon" else ": it is for sgd and rmsprop"
        yield f"engine.momentum has no effect with engine.optimizer {engine.optimizer}{here}"
    if engine.betas != default["betas"].default and engine.optimizer == "sgd":
        yield "engine.betas has no effect with engine.optimizer sgd"
    if engine.checkpoint_every_blocks > 1 and engine.activation_checkpointing == "none":
        yield "engine.checkpoint_every_blocks has no effect with engine.activation_checkpointing none"
    if engine.offload_optimizer != default["offload_optimizer"].default and engine.offload == "none":
        yield "engine.offload_optimizer has no effect with engine.offload none"


def _cut_off(engine: EngineConfig, max_steps: int) -> Iterator[str]:
    """Schedules that do not fit into the run."""
    if engine.warmup_steps >= max_steps:
        yield (
            f"engine.warmup_steps {engine.warmup_steps} is no shorter than the run of {max_steps} steps: the rate only "
            "rises"
        )
    elif engine.schedule == "wsd" and (engine.decay_steps or 0) > max_steps - engine.warmup_steps:
        yield (
            f"engine.decay_steps {engine.decay_steps} is longer than what the run of {max_steps} steps has after its "
            "warm-up: the rate falls at once, and never holds"
        )
    for room, rates in engine.rooms.items():
        if rates.start_step >= max_steps:
            yield (
                f"engine.rooms.{room}.start_step {rates.start_step} lies behind the run of {max_steps} steps: the room "
                "never learns"
            )
