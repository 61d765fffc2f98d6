"""The DeepSpeed JSON of a run, derived from the typed config by one pure function."""

from __future__ import annotations

from typing import Any

from trichord.engine.config import EngineConfig
from trichord.engine.overlay import lay_over

# Elements of a message that DeepSpeed collects before it sends. Its own choice, 5e8, is the upper end: 1 GB of buffer
# in bf16, two of them with overlap. What is still to send when the backward pass ends cannot hide behind it, so a model
# is sent in 16 messages at least; below 2^24 elements (32 MiB in bf16) a message takes as long to start as to send on
# many nodes, so smaller models are sent in fewer. Powers of two: a few parameters more or less change no size.
MOST_BUCKET_ELEMENTS = 500_000_000
LEAST_BUCKET_ELEMENTS = 2**24
_MESSAGES = 16


def bucket_elements(num_parameters: int) -> int:
    """Elements per message for a model of `num_parameters` trainable parameters."""
    share = max(1, num_parameters // _MESSAGES)
    return min(MOST_BUCKET_ELEMENTS, max(LEAST_BUCKET_ELEMENTS, 2 ** (share.bit_length() - 1)))


def deepspeed_config(
    engine: EngineConfig, *, micro_rows: int, grad_accum_steps: int, num_parameters: int | None = None
) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    num_parameters: trainable ones, by which messages are sized; None: as for the largest models.

    Raises:
        ConfigError: the user's overlay contradicts a typed key, or has a name that is none or refused.
    """
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": grad_accum_steps,
        # Stage 0 is clipped by our own step, which needs the norm (DeepSpeed computes it there and drops it).
        "gradient_clipping": 0.0 if engine.zero_stage == 0 else engine.max_grad_norm,
        "zero_optimization": _zero(engine, num_parameters),
        "zero_allow_untested_optimizer": True,  # the optimizer is torch's own AdamW, also under offload
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,  # we log ourselves
        **_precision(engine),
    }
    return lay_over(derived, engine.deepspeed)


def _zero(engine: EngineConfig, num_parameters: int | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage == 0:
        return zero
    bucket = MOST_BUCKET_ELEMENTS if num_parameters is None else bucket_elements(num_parameters)
    zero["reduce_bucket_size"] = bucket
    zero["allgather_bucket_size"] = bucket
    # Reduce-scatter moves 2 bytes per gradient element where the default all-reduce of whole buckets moves 3.
    zero["use_multi_rank_bucket_allreduce"] = False
    # Stages 2 and 3 send gradients in every micro-step, so there is a backward pass to hide behind each time. Stage 1
    # sends once per step; a second buffer of the size of a message would buy it one sixteenth of that.
    zero["overlap_comm"] = engine.zero_stage >= 2
    zero["contiguous_gradients"] = True
    if engine.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False  # checkpoints are our own slices
        if engine.activation_checkpointing == "selective":
            # DeepSpeed's own linear adds the bias in place, to the very product that selective recomputation keeps:
            # the bias would count twice in the backward pass. What its linear is for (autograd holding on to gathered
            # weights) does not happen in blocks that are recomputed.
            zero["memory_efficient_linear"] = False
        if engine.hpz_ranks > 1:
            zero["zero_hpz_partition_size"] = engine.hpz_ranks
    place = {"device": "cpu", "pin_memory": False}
    if engine.nvme_path is not None:
        place = {"device": "nvme", "nvme_path": engine.nvme_path, "pin_memory": False}
    if engine.offload != "none":
        zero["offload_optimizer"] = dict(place)
    if engine.offload == "all":
        zero["offload_param"] = dict(place)
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
