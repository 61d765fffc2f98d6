"""`trichord plan`: what a run will need, before it runs. Parameters are counted on the meta device, without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch

from trichord.batches.config import BatchesConfig
from trichord.batches.tokenizer import load_tokenizer
from trichord.checkpoints.config import CheckpointsConfig
from trichord.core.errors import ConfigError
from trichord.encoders.config import EncodersConfig
from trichord.engine.config import EngineConfig
from trichord.fusion.config import FusionConfig
from trichord.fusion.model import ROOMS, build_model, param_room
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ObjectivesConfig
from trichord.planning.memory import GIB, ModelStates, checkpoint_bytes, model_states
from trichord.planning.rows import RowSplit
from trichord.samples.config import SamplesConfig

# Qwen3's; among the vocabularies in common use a large one, so that a plan without a tokenizer errs on the safe side.
_ASSUMED_VOCAB_SIZE = 151_936
_ASSUMED_IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}


class RunToPlan(Protocol):
    """What a plan reads of a `RunConfig`: the run's identity and the leaves of the rooms."""

    @property
    def run(self) -> Any: ...
    @property
    def samples(self) -> SamplesConfig: ...
    @property
    def batches(self) -> BatchesConfig: ...
    @property
    def layers(self) -> LayersConfig: ...
    @property
    def encoders(self) -> EncodersConfig: ...
    @property
    def fusion(self) -> FusionConfig: ...
    @property
    def objectives(self) -> ObjectivesConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def checkpoints(self) -> CheckpointsConfig: ...


def plan(config: RunToPlan, gpus: int, *, vocab_size: int | None = None) -> dict[str, Any]:
    """Predict parameters, model states per GPU for every ZeRO stage, row split and checkpoint size of a run.

    gpus: ranks of the job. vocab_size: None takes the tokenizer's, or an assumed one where it cannot be loaded.

    Returns:
        Plain data, bytes as ints: keys `prediction`, `gpus`, `parameters` (room -> trainable, frozen), `chosen`,
        `states` (stage -> bytes by kind; only those that the config allows), `rows`, `checkpoint`, `assumptions`,
        `not_predicted`. `render_plan` makes it readable.

    Raises:
        ConfigError: no GPUs, or the model cannot be built from the config.
    """
    if gpus < 1:
        raise ConfigError(f"a plan needs at least 1 GPU, got {gpus}")
    vocabulary, special, vocab_note = _vocabulary(config.batches.tokenizer, vocab_size)
    parameters = count_parameters(config, vocabulary, special)
    trainable = sum(room["trainable"] for room in parameters.values())
    frozen = sum(room["frozen"] for room in parameters.values())
    split = RowSplit(config.batches.rows_per_step, gpus, config.batches.micro_rows)
    checkpoint = checkpoint_bytes(trainable, frozen)
    return {
        "prediction": True,
        "run": config.run.name,
        "gpus": gpus,
        "vocab_size": vocabulary,
        "parameters": parameters,
        "trainable": trainable,
        "frozen": frozen,
        "chosen": {key: getattr(config.engine, key) for key in ("zero_stage", "precision", "offload")},
        "states": {stage: asdict(states) for stage, states in _all_stages(config, trainable, frozen, gpus).items()},
        "rows": _rows(config, split),
        "checkpoint": {
            "bytes": checkpoint,
            "per_rank_bytes": checkpoint // gpus,
            "kept_bytes": checkpoint * (config.checkpoints.keep_last + 1),
        },
        "assumptions": [vocab_note, *_assumptions(config)],
        "not_predicted": ["activations", "time of a step", "communication", "days and cost"],
    }


def count_parameters(config: RunToPlan, vocab_size: int, special: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Room of the model -> {"trainable", "frozen"}, counted on the meta device; tied weights count once."""
    with torch.device("meta"):
        model = build_model(
            config.encoders, config.fusion, config.objectives, config.samples, config.layers, vocab_size, special
        )
    counts = {room: {"trainable": 0, "frozen": 0} for room in ROOMS}
    for name, parameter in model.named_parameters():
        counts[param_room(name)]["trainable" if parameter.requires_grad else "frozen"] += parameter.numel()
    return {room: count for room, count in counts.items() if any(count.values())}


def render_plan(facts: Mapping[str, Any]) -> str:
    """A plan as lines for a person. Sizes in GiB (2^30 bytes)."""
    lines = [f"PREDICTION for {facts['run']!r} on {facts['gpus']} GPUs: computed from the config, not measured", ""]
    lines += [*_parameter_lines(facts), "", *_state_lines(facts), "", *_row_lines(facts), ""]
    checkpoint = facts["checkpoint"]
    lines.append(
        f"checkpoint        {_gib(checkpoint['bytes'])}, {_gib(checkpoint['per_rank_bytes'])} written per rank, "
        f"{_gib(checkpoint['kept_bytes'])} of disk while the oldest is replaced"
    )
    lines += ["", "assumed", *(f"  - {text}" for text in facts["assumptions"])]
    lines += ["", f"not predicted yet: {', '.join(facts['not_predicted'])}. Leave room for activations."]
    return "\n".join(lines)


def _vocabulary(tokenizer: str, vocab_size: int | None) -> tuple[int, Mapping[str, int], str]:
    """(size, special ids, how we know)."""
    if vocab_size is not None:
        return vocab_size, _ASSUMED_IDS, f"vocabulary of {vocab_size:,} as given"
    try:
        loaded = load_tokenizer(tokenizer)
    except ConfigError:
        note = f"tokenizer {tokenizer} is not here: a vocabulary of {_ASSUMED_VOCAB_SIZE:,} is assumed"
        return _ASSUMED_VOCAB_SIZE, _ASSUMED_IDS, note
    return loaded.vocab_size, loaded.special_ids, f"vocabulary of {loaded.vocab_size:,} from tokenizer {tokenizer}"


def _all_stages(config: RunToPlan, trainable: int, frozen: int, gpus: int) -> dict[int, ModelStates]:
    """Model states at every stage, with the run's precision and offload where the stage allows them."""
    engine = config.engine
    found = {}
    for stage in (0, 1, 2, 3):
        if stage == 0 and (engine.precision in ("bf16", "fp16") or engine.offload != "none"):
            continue  # refused by the config
        if stage < 3 and engine.offload == "all":
            continue
        found[stage] = model_states(
            trainable,
            frozen,
            zero_stage=stage,
            precision=engine.precision,
            world_size=gpus,
            offload=engine.offload,
        )
    return found


def _rows(config: RunToPlan, split: RowSplit) -> dict[str, Any]:
    better = split.better()
    return {
        "rows_per_step": split.rows,
        "row_tokens": config.batches.row_tokens,
        "tokens_per_step": split.rows * config.batches.row_tokens,
        "micro_rows": split.micro_rows,
        "accumulation": split.accumulation,
        "wasted_frac": split.wasted_frac,
        "idle_ranks": split.idle_ranks,
        "better_micro_rows": better.micro_rows if better else None,
        "better_wasted_frac": better.wasted_frac if better else None,
        "max_steps": config.run.max_steps,
    }


def _assumptions(config: RunToPlan) -> list[str]:
    engine = config.engine
    low = "2 bytes" if engine.precision in ("bf16", "fp16") else "4 bytes"
    lines = [
        f"weights and gradients {low} an element, fp32 master 4, Adam's two moments 8 "
        "(ZeRO, Rajbhandari et al. 2020, section 3)",
        "all ranks are data-parallel",
        "buffers: DeepSpeed's reduce buckets of 5e8 elements and, at stage 3, up to 1e9 gathered elements, "
        "or the whole model where that is smaller",
        "not counted: the CUDA context, fragmentation, and a short-lived fp32 copy of the gradient partition",
    ]
    if engine.offload != "none":
        lines.append("offload keeps master, moments and an fp32 copy of the gradients on the host")
    if engine.deepspeed:
        lines.append(f"the overlay engine.deepspeed is not looked at ({', '.join(engine.deepspeed)})")
    return lines


def _parameter_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{'parameters':<18}{'trainable':>16}{'frozen':>16}"]
    for room, count in facts["parameters"].items():
        lines.append(f"  {room:<16}{count['trainable']:>16,}{count['frozen']:>16,}")
    return [*lines, f"  {'sum':<16}{facts['trainable']:>16,}{facts['frozen']:>16,}"]


def _state_lines(facts: Mapping[str, Any]) -> list[str]:
    chosen = facts["chosen"]
    kinds = ("weights", "gradients", "master", "moments", "buffers")
    title = f"model states per GPU, {chosen['precision']}, offload {chosen['offload']}"
    lines = [title, f"  {'':<16}" + "".join(f"{kind:>12}" for kind in (*kinds, "sum", "host"))]
    for stage, states in facts["states"].items():
        values = [states[kind] for kind in kinds]
        mark = " <- chosen" if int(stage) == chosen["zero_stage"] else ""
        cells = "".join(f"{_gib(value):>12}" for value in (*values, sum(values), states["host"]))
        lines.append(f"  {'ZeRO-' + str(stage):<16}{cells}{mark}")
    return lines


def _row_lines(facts: Mapping[str, Any]) -> list[str]:
    rows = facts["rows"]
    tokens = f"{rows['row_tokens']:,} tokens = {rows['tokens_per_step']:,} tokens"
    lines = [
        f"rows per step     {rows['rows_per_step']} of {tokens}",
        f"micro-steps       {rows['accumulation']} with {rows['micro_rows']} rows each on every GPU",
    ]
    if rows["wasted_frac"] > 0:
        lines.append(f"empty rows        {100 * rows['wasted_frac']:.1f} % of what is computed")
    if rows["idle_ranks"]:
        lines.append(f"idle GPUs         {rows['idle_ranks']}: there are fewer rows than GPUs")
    if rows["better_micro_rows"]:
        better = 100 * rows["better_wasted_frac"]
        lines.append(f"better            batches.micro_rows={rows['better_micro_rows']} leaves {better:.1f} % empty")
    if rows["max_steps"]:
        lines.append(
            f"tokens in all     {rows['max_steps'] * rows['tokens_per_step']:,} in {rows['max_steps']:,} steps"
        )
    return lines


def _gib(size: int) -> str:
    gib = size / GIB
    if size == 0:
        return "0"
    return f"{gib:,.2f} GiB" if gib >= 0.01 else f"{size / 2**20:.2f} MiB"
