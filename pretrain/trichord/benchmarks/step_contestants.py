"""The loops that `trichord bench step` compares, over one model and the same batches in memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trichord.assembly import build_loader, build_recorder, build_stepper, slot_layout
from trichord.batches.loader import StepBatch
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.tokenizer import load_tokenizer
from trichord.benchmarks.step import StepRequest
from trichord.config.identity import RunFolder, run_path
from trichord.config.run import RunConfig
from trichord.core.dist import rank_facts
from trichord.engine.build import EngineModule, build_engine, set_rates, start_process_group
from trichord.engine.param_groups import build_param_groups
from trichord.engine.stop import StopFlag
from trichord.journal import Progress, Recording
from trichord.restore import build_from_config, training_lengths
from trichord.train import local_counts

Step = Callable[[int], object]
"""Takes step `number`."""
_KEPT_STEPS = 8  # batches held in memory, used in turn
_TIMEOUT_S = 600.0


def build_contestants(request: StepRequest) -> dict[str, Step]:
    """Each with an engine, a model and an optimizer of its own, over the same batches."""
    config = tri_modal_config(request)
    start_process_group(_TIMEOUT_S)
    batches = collect_batches(config)
    makers = {"trichord": training_step, "deepspeed": _deepspeed, "ddp": _ddp}
    return {name: makers[name](config, batches) for name in request.contestants}


def tri_modal_config(request: StepRequest) -> RunConfig:
    """A model of 11 M parameters on images, speech and captions, 2 rows of 512 tokens per rank and micro-step."""
    corpus = Path(request.folder) / "corpus"
    ranks = rank_facts().world_size
    source = {"name": "pairs", "shards": str(corpus / "wav-*.tar"), "require": ["image", "audio", "text"]}
    return RunConfig.model_validate(
        {
            "run": {"name": f"stage-{request.stage}", "root": request.folder, "max_steps": 10_000},
            "shards": {"window_samples": 16, "sources": [source]},
            "samples": {"image": {"size": 64}, "audio": {"sample_rate": 16_000, "max_seconds": 5}},
            "batches": {
                "tokenizer": str(corpus / "tokenizer"),
                "rows_per_step": 2 * ranks * request.accumulation,
                "micro_rows": 2,
                "row_tokens": request.row_tokens,
                "max_samples_per_row": 8,
            },
            "encoders": {
                "vision": {
                    "name": "vit_tiny_patch16_224",
                    "options": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
                },
                "audio": {"mel": {"n_mels": 40}, "hidden_size": 128, "num_layers": 2, "num_heads": 4, "stride": 8},
            },
            "fusion": {"kind": "interleave", "trunk": trunk_of(request)},
            "objectives": {"next_token": {}},
            "engine": {"zero_stage": request.stage, "precision": "fp32", "lr": 1e-4},
            "tracking": {"wandb": {"mode": "off"}},
        }
    )


def trunk_of(request: StepRequest) -> dict[str, Any]:
    return {
        "family": "llama",
        "hidden_size": 320,
        "intermediate_size": 1024,
        "num_layers": request.num_layers,
        "num_heads": 5,
        "num_kv_heads": 5,
    }


def collect_batches(config: RunConfig) -> list[StepBatch]:
    """This rank's batches of the first steps."""
    facts, model = rank_facts(), build_model_of(config)
    loader = build_loader(config, training_lengths(config, model), run_path(config), facts, None)
    try:
        return list(islice(loader, _KEPT_STEPS))
    finally:
        loader.close()


def build_model_of(config: RunConfig) -> Any:
    torch.manual_seed(0)
    return build_from_config(config, load_tokenizer(config.batches.tokenizer))


def training_step(config: RunConfig, batches: list[StepBatch]) -> Callable[[int], StepBatch]:
    """What the training loop does with a batch between two calls of the loader."""
    layout = slot_layout(config, dist.get_world_size())
    micro_rows, device = config.batches.micro_rows, torch.device("cpu")
    model = build_model_of(config)
    engine = build_engine(model, config.engine, micro_rows=micro_rows, grad_accum_steps=layout.num_micro_batches)
    stepper = build_stepper(config, engine, device, layout)
    folder = RunFolder("fresh", run_path(config), 1)
    recorder = build_recorder(config, folder, None, dist.get_rank() == 0)
    recording = Recording(config, recorder, stepper, folder, 0, model)
    progress, stop = Progress(), StopFlag()

    def step(number: int) -> StepBatch:
        recording.begin(progress.step)
        batch = batches[number % len(batches)]
        lr = set_rates(engine, config.engine, progress.step, config.run.max_steps or 0)
        result = stepper.run(batch.micro_batches, local_counts(batch, stop))
        progress.advance(result)
        recording.step(progress, result, batch, lr=lr)
        progress.check(config, batch, result, recorder)
        return batch

    return step


def _deepspeed(config: RunConfig, batches: list[StepBatch]) -> Step:
    layout = slot_layout(config, dist.get_world_size())
    engine = build_engine(
        build_model_of(config),
        config.engine,
        micro_rows=config.batches.micro_rows,
        grad_accum_steps=layout.num_micro_batches,
    )

    def step(number: int) -> None:
        for batch in batches[number % len(batches)].micro_batches:
            engine.backward(_mean_loss(engine(batch), batch))
            engine.step()

    return step


def _ddp(config: RunConfig, batches: list[StepBatch]) -> Step:
    model = EngineModule(build_model_of(config))
    groups = build_param_groups(model.model, config.engine)
    wrapped = nn.parallel.DistributedDataParallel(model)
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
        lr=config.engine.lr,
        betas=config.engine.betas,
    )

    def step(number: int) -> None:
        micro_batches = batches[number % len(batches)].micro_batches
        for at, batch in enumerate(micro_batches):
            wrapped.require_backward_grad_sync = at == len(micro_batches) - 1
            (_mean_loss(wrapped(batch), batch) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(parameters, config.engine.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _mean_loss(output: dict[str, Tensor], batch: PackedBatch) -> Tensor:
    """Of this rank's labels, as simple loops take it."""
    return output["next_token_loss_sum"] / max(1, batch.num_labels)
