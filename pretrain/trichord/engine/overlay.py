"""What of DeepSpeed's own JSON a user may set by `engine.deepspeed`, and what a typed key, or nothing here, stands for.

Needs neither torch nor DeepSpeed, so that `trichord config check` can say it; a test compares the names with those that
the installed DeepSpeed asks for. The table in docs/guides/training.md is of these names.
"""

from __future__ import annotations

import difflib
from typing import Any

from trichord.core.errors import ConfigError

TAKEN = (
    "zero_optimization",
    *("fp16", "bf16", "torch_autocast"),  # of the run's own precision
    *("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "timers", "dump_state"),
    *("steps_per_print", "log_level", "aio"),
)
"""Top-level names whose values go to DeepSpeed, over our defaults."""

_PRECISION = "engine.precision says what it is; set that key"
_ARITHMETIC = "losses are normalised over the global batch, and its sums of gradients are what that counts on"
_TRACKING = "metrics come from the run itself; set tracking"
_GONE = "DeepSpeed has removed it"
REFUSED = {
    "train_batch_size": "set batches.rows_per_step",
    "train_micro_batch_size_per_gpu": "set batches.micro_rows",
    "gradient_accumulation_steps": "it follows from batches.rows_per_step, batches.micro_rows and the number of ranks",
    "managed_gradient_accumulation": "it follows from batches.rows_per_step, batches.micro_rows and the ranks",
    "gradient_clipping": "set engine.max_grad_norm",
    "optimizer": "engine.optimizer says what it is; set that key",
    "scheduler": "engine.schedule says what it is; set that key",
    "bfloat16": _PRECISION,
    "amp": _PRECISION,
    "data_types": "gradients are summed in the dtype of the weights; engine.precision=autocast_bf16 sums in fp32",
    "communication_data_type": f"gradients travel in the dtype of the weights: {_ARITHMETIC}",
    "seq_parallel_communication_data_type": "engine.sequence_parallel has exchanges of its own",
    "prescale_gradients": _ARITHMETIC,
    "gradient_predivide_factor": _ARITHMETIC,
    "gradient_allreduce_op": _ARITHMETIC,
    "disable_allgather": "weights would differ between ranks",
    "zero_allow_untested_optimizer": "the optimizer is torch's or our own, so it is always true",
    "zero_force_ds_cpu_optimizer": "set engine.offload_optimizer",
    "activation_checkpointing": "set engine.activation_checkpointing",
    "checkpoint": "checkpoints are written by the run itself; set checkpoints",
    "datastates_ckpt": "checkpoints are written by the run itself; set checkpoints",
    "nebula": "checkpoints are written by the run itself; set checkpoints",
    "data_efficiency": "data is read by the run itself; set shards and batches",
    "curriculum_learning": "data is read by the run itself; set shards and batches",
    "dataloader_drop_last": "data is read by the run itself; set shards and batches",
    "tensorboard": "set tracking.tensorboard",
    "wandb": "set tracking.wandb",
    "csv_monitor": _TRACKING,
    "comet": _TRACKING,
    "compile": "set engine.compile",
    "graph_harvesting": _GONE,
    "autotuning": "`trichord plan` searches for the best layout",
    "elasticity": "a run goes on with any number of ranks as it is",
    "tensor_parallel": "ranks share rows, not weights; set engine.sequence_parallel",
    "sequence_parallel_size": "set engine.sequence_parallel",
    "data_parallel_size": "it follows from the number of ranks and engine.sequence_parallel",
    "expert_parallel": "no model here has experts",
    "use_data_before_expert_parallelism": "no model here has experts",
    "pipeline": "models are not divided into stages",
    "hybrid_engine": "it generates, and this trains",
    "disable_python_gc": "the run's own watch over peers counts on Python's",
    "vocabulary_size": "it has no effect; the tokenizer says it",
    "weight_quantization": "it is for inference",
    **dict.fromkeys(("compression_training", "quantize_training", "eigenvalue", "progressive_layer_drop"), _GONE),
    **dict.fromkeys(("sparse_gradients", "sparse_attention"), _GONE),
}
"""Top-level names that are refused -> why, or what to set."""

_ZERO = "zero_optimization"
_TYPED = {
    f"{_ZERO}.stage": "engine.zero_stage",
    f"{_ZERO}.zero_hpz_partition_size": "engine.hpz_ranks",
    **{f"{_ZERO}.{part}.device": "engine.offload" for part in ("offload_optimizer", "offload_param")},
    **{f"{_ZERO}.{part}.nvme_path": "engine.nvme_path" for part in ("offload_optimizer", "offload_param")},
    **{f"{_ZERO}.{key}": "engine.offload" for key in ("cpu_offload", "cpu_offload_param")},
    **{f"{section}.enabled": "engine.precision" for section in ("fp16", "bf16", "torch_autocast")},
    **{f"torch_autocast.{key}": "engine.precision" for key in ("dtype", "lower_precision_safe_modules")},
}
"""Keys inside sections that a typed key stands for, whether our JSON has them or leaves them at DeepSpeed's default."""
_REFUSED_INSIDE = {
    f"{_ZERO}.zenflow": "it is another update than that of engine.optimizer",
    f"{_ZERO}.compute_grad_norm": "engine.max_grad_norm and the logged norm need it",
    "fp16.auto_cast": "batches have the dtypes the model wants",
    "fp16.fp16_master_weights_and_grads": "masters are fp32; for small states set engine.optimizer_states",
    "bf16.bf16_master_weights_and_grads": "masters are fp32; for small states set engine.optimizer_states",
    "bf16.bf16_optimizer_states": "set engine.optimizer_states",
    "bf16.check_grad_overflow": "steps that are not finite are skipped by it; see engine.max_bad_steps",
}
"""As `REFUSED`, of keys inside sections that are taken."""
_TYPED_WHERE_SET = {f"{_ZERO}.memory_efficient_linear": "engine.activation_checkpointing"}
"""As `_TYPED`, but free where our JSON does not have them."""
_LEAST = {"steps_per_print": 1, "flops_profiler.profile_step": 1, "flops_profiler.top_modules": 1}
_LEAST |= {"flops_profiler.module_depth": -1}
"""Whole numbers that DeepSpeed takes as they come, to fail in the middle of a run -> the smallest it can use."""

_ABSENT = object()


def lay_over(derived: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """Our JSON with the user's values on top: they win over defaults, and may not contradict a typed key.

    Raises:
        ConfigError: a name that DeepSpeed does not know, one that is refused, or another value than a typed key's.
    """
    for name in overlay:
        if refusal := _refusal(name, derived):
            raise ConfigError(refusal)
    return _merged(derived, overlay, "")


def _refusal(name: str, derived: dict[str, Any]) -> str | None:
    where = f"engine.deepspeed.{name}"
    if name in REFUSED:
        return f"{where} is not for this run: {REFUSED[name]}"
    if name in ("fp16", "bf16", "torch_autocast") and name not in derived:
        return f"{where} is not for this run: {_PRECISION}"
    if name in TAKEN:
        return None
    near = difflib.get_close_matches(name, (*TAKEN, *REFUSED), n=1, cutoff=0.5)
    return f"{where}: DeepSpeed knows no such key; " + (f"nearest: {near[0]}" if near else f"taken: {', '.join(TAKEN)}")


def _merged(derived: dict[str, Any], overlay: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(derived)
    for name, value in overlay.items():
        where, ours = f"{path}{name}", derived.get(name, _ABSENT)
        if where not in _REFUSED_INSIDE and isinstance(value, dict) and (ours is _ABSENT or isinstance(ours, dict)):
            merged[name] = _merged({} if ours is _ABSENT else ours, value, f"{where}.")
        elif isinstance(ours, dict):
            raise ConfigError(f"engine.deepspeed.{where}: expected a mapping of keys to values, got {value!r}")
        else:
            _require_agreement(where, value, ours)
            merged[name] = value
    return merged


def _require_agreement(where: str, value: Any, ours: Any) -> None:
    if where in _REFUSED_INSIDE:
        raise ConfigError(f"engine.deepspeed.{where} is not for this run: {_REFUSED_INSIDE[where]}")
    least = _LEAST.get(where)
    if least is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise ConfigError(f"engine.deepspeed.{where}: expected a whole number from {least} on, got {value!r}")
    typed = _TYPED.get(where) or (_TYPED_WHERE_SET.get(where) if ours is not _ABSENT else None)
    if typed is None or value == ours:
        return
    says = "leaves it at DeepSpeed's default" if ours is _ABSENT else f"says {ours!r}"
    raise ConfigError(
        f"engine.deepspeed.{where} is {value!r}, but {typed} {says}; set {typed}, and take this out of the overlay"
    )
