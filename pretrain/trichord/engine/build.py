"""From a torch model to a DeepSpeed engine: process group, optimizer, ZeRO, time limits on every group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trichord.batches.packed_batch import PackedBatch
from trichord.core.dist import RankFacts, rank_facts
from trichord.core.log import get_logger
from trichord.engine.config import EngineConfig
from trichord.engine.deepspeed_config import deepspeed_config
from trichord.engine.ema import WeightAverage
from trichord.engine.job import check_job, overlay_named
from trichord.engine.matrices import matrix_rounds
from trichord.engine.muon import Muon
from trichord.engine.optimizers import build_optimizer
from trichord.engine.param_groups import build_param_groups, fused_matrices, rate_of
from trichord.engine.partition import hand_over
from trichord.engine.sequence import share_sequences
from trichord.engine.wire import wire_meter
from trichord.layers.batch_norm import has_shared_statistics
from trichord.layers.initial import OwnSlices
from trichord_kernels.tables.agree import agree_on_tables

log = get_logger(__name__)

# Of the parameters that the model computes with.
COMPUTE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast_bf16": torch.float32,
}


def pick_device(facts: RankFacts) -> torch.device:
    """The rank's device: its GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", facts.local_rank)
    return torch.device("cpu")


def start_process_group(timeout_s: float) -> tuple[RankFacts, torch.device]:
    """Join the job (NCCL on GPUs, gloo on CPUs). A process started alone becomes a job of one rank.

    Returns:
        The rank facts and the device of this rank.
    """
    wire_meter()  # before DeepSpeed is imported, which keeps some of torch's functions
    facts = rank_facts()
    device = pick_device(facts)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for an accelerator when it is first imported
    else:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            os.environ.setdefault(name, value)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **_rendezvous())
    _import_deepspeed().init_distributed(dist.get_backend(), verbose=False)
    if device.type == "cuda":
        agree_on_tables()  # one set of kernel tile sizes, or ranks would round differently
    return facts, device


def _rendezvous() -> dict[str, Any]:
    """torchrun's environment where there is one; alone, a store inside this process, so that no port is needed."""
    if "MASTER_PORT" in os.environ:
        return {}
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def _import_deepspeed() -> Any:
    import logging
    import warnings

    # It calls collectives by names that newer torch versions call deprecated, once per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed

    # A shared-memory all-reduce for inference; building it takes minutes on a CPU and training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class EngineModule(nn.Module):
    """The face of the model towards DeepSpeed: outputs as a plain dict, where its backward hooks find the tensors."""

    def __init__(self, model: Any):
        """model: a `Trichord`."""
        super().__init__()
        self.model = model

    def forward(
        self, batch: PackedBatch, towers_only: bool = False, logits_at: Tensor | None = None
    ) -> dict[str, Tensor]:
        """logits_at (K,) int64: instead of the outputs, next-token `logits` (K, V) at these positions."""
        if logits_at is not None:
            return {"logits": self.model.logits(batch, logits_at)}
        output = self.model(batch, towers_only=towers_only)
        return {name: value for name, value in vars(output).items() if isinstance(value, Tensor)}


def build_engine(
    model: nn.Module,
    engine: EngineConfig,
    *,
    micro_rows: int,
    grad_accum_steps: int,
    slices: OwnSlices | None = None,
) -> Any:
    """Wrap `model` into a DeepSpeed engine with the optimizer of the config; all ranks must hold equal weights.

    slices: what the model was built in, if it was.

    Returns:
        deepspeed.DeepSpeedEngine. Its `.module` is an `EngineModule`, its `.weight_average` a `WeightAverage` or None.
    """
    deepspeed = _import_deepspeed()
    check_job(engine, micro_rows, dist.get_world_size())
    device = pick_device(rank_facts())
    optimizer = build_optimizer(build_param_groups(model, engine), engine, device)
    _tell_batch_statistics(model, grad_accum_steps)
    _tell_untested(engine)
    num_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = deepspeed_config(
        engine, micro_rows=micro_rows, grad_accum_steps=grad_accum_steps, num_parameters=num_parameters
    )
    if slices is not None:
        hand_over(model, slices, config, COMPUTE_DTYPES[engine.precision])
    share_sequences(model, engine)
    wrapped = EngineModule(model if engine.offload == "all" else model.to(device))
    with overlay_named(engine):
        built, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
    apply_timeout(engine.timeout_s)
    if isinstance(optimizer, Muon):
        parts = {id(p): fused_matrices(name, p) for name, p in model.named_parameters()}
        optimizer.place(matrix_rounds(built, lambda parameter: parts[id(parameter)]))
    built.weight_average = WeightAverage(built, engine.ema_decay) if engine.ema_decay is not None else None
    return built


def _tell_untested(engine: EngineConfig) -> None:
    untested = {
        "engine.hpz_ranks": ("has run on CPU ranks only", engine.hpz_ranks > 1),
        "engine.nvme_path": ("has not run at all", engine.nvme_path is not None),
    }
    for key, (how_far, is_set) in untested.items():
        if is_set and dist.get_rank() == 0:
            log.warning("%s is passed on to DeepSpeed as it is, and %s in a test of this version", key, how_far)


def _tell_batch_statistics(model: nn.Module, grad_accum_steps: int) -> None:
    """Statistics are those of a micro-step: the one part of a step that depends on how it is divided."""
    if grad_accum_steps > 1 and dist.get_rank() == 0 and has_shared_statistics(model):
        log.warning(
            "batch norms take their statistics over one of the %d micro-steps of a step, on all ranks: with another "
            "batches.micro_rows or number of ranks losses differ; with encoders.vision.batch_stats=frozen they do not",
            grad_accum_steps,
        )


def apply_timeout(timeout_s: float) -> None:
    """Give every process group the run's limit: groups that DeepSpeed makes start with torch's 30 minutes."""
    # torch 2.14 has a public function; before that there is only the private one.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def set_rates(engine: Any, config: EngineConfig, step: int, total_steps: int) -> float:
    """Set the learning rate of every group for optimizer step `step` (0-based); returns that of `engine.lr` itself."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate_of(group, config, step, total_steps)
    plain = {"lr_ratio": 1.0, "schedule": config.schedule, "start_step": 0}
    return rate_of(plain, config, step, total_steps)
