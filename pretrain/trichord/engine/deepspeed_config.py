"""The DeepSpeed JSON of a run, derived from the typed config by one pure function."""

from __future__ import annotations

from typing import Any

from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig

# Sizes in elements. 5e8 fp16 elements is DeepSpeed's own default; on a model that is smaller than a bucket the whole
# gradient goes in one message, and the buffer is only as large as the model.
BUCKET_ELEMENTS = 500_000_000


def deepspeed_config(engine: EngineConfig, *, micro_rows: int, grad_accum_steps: int) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    Raises:
        ConfigError: the user's overlay sets a key that the typed config also sets, to another value.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": grad_accum_steps,
        # Stage 0 is clipped by our own step, which needs the norm (DeepSpeed computes it there and drops it).
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else engine.max_grad_norm,
        "zero_optimization": _zero(engine),
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's own AdamW, also under offload
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # we log ourselves
        **_precision(engine),
    }
    return _overlay(derived, engine.deepspeed, path="engine.deepspeed")


def _zero(engine: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 0:
        return zero
    zero["reduce_bucket_size"] = BUCKET_ELEMENTS
    zero["allgather_bucket_size"] = BUCKET_ELEMENTS
    # Reduce-scatter moves 2 bytes per gradient element where the default all-reduce of whole buckets moves 3.
    zero["use_multi_rank_bucket_allreduce"] = False
    zero["overlap_comm"] = engine.zero_stage >= 2
    zero["contiguous_gradients"] = True
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False  # checkpoints are our own slices
        if engine.activation_checkpointing == "selective":
            # DeepSpeed's own linear adds the bias in place, to the very product that selective recomputation keeps:
            # the bias would count twice in the backward pass. What its linear is for (autograd holding on to gathered
            # weights) does not happen in blocks that are recomputed.
            zero["memory_efficient_linear"] = False
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if engine.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return zero


def _precision(engine: EngineConfig) -> dict[str, Any]:
    if engine.precision == "bf16":
        return {"bf16": {"enabled": True}}
    if engine.precision == "fp16":
        return {"fp16": {"enabled": True, "initial_scale_power": 16}}
    if engine.precision == "autocast_bf16":
        return {
            "torch_autocast": {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": ["torch.nn.Linear"],
            }
        }
    return {}


def _overlay(derived: dict[str, Any], overlay: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in overlay.items():
        where = f"{path}.{key}"
        if key not in derived:
            merged[key] = value
        elif isinstance(derived[key], dict) and isinstance(value, dict):
            merged[key] = _overlay(derived[key], value, where)
        elif derived[key] != value:
            raise ConfigError(
                f"{where} is {value!r}, but the typed config says {derived[key]!r}; "
                "change the typed key, or remove it from the overlay"
            )
    return merged
