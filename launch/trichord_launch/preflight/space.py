"""Room on the disk for all checkpoints that are kept, and for the one that is being written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from trichord.checkpoints.manifest import incomplete_reason, step_folders
from trichord.config.identity import run_path
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.folders import existing
from trichord_launch.preflight.models import Reference, local_folder
from trichord_launch.preflight.plan_file import Plan
from trichord_launch.preflight.size import shown_size

_STATE_BYTES = {"adamw": 8, "adam": 8, "muon": 4, "adamw_8bit": 2, "rmsprop": 4}


def check_space(config: RunConfig, plan: Plan | None, config_name: str) -> Finding:
    """Free space against what checkpoints will take; quotas are not seen. config_name: as the user named it, with
    overrides."""
    try:
        folder = run_path(config)
    except ConfigError as error:
        return Finding("disk", "skip", str(error))
    size, how = checkpoint_size(config, folder, plan)
    kept = checkpoints_on_disk(config)
    there = sum(_bytes_in(path) for path in step_folders(folder / "checkpoints").values())
    needed = max(kept * size - there, size)
    place = existing(folder)
    free = shutil.disk_usage(place).free
    said = f"{shown_size(free)} free in {place}; {kept} checkpoints of {shown_size(size)} ({how})"
    said += f", {shown_size(there)} of them there already" if there else ""
    if free < needed:
        remedy = "free space, choose another run.root, or keep fewer (checkpoints.keep_last)"
        return Finding("disk", "fail", f"{said}: {shown_size(needed - free)} too little", remedy)
    if plan is None and not there:
        remedy = f"trichord plan {config_name} --gpus N --save plan.json, then preflight --plan plan.json"
        return Finding("disk", "warn", f"{said}; without a plan only the least is known", remedy)
    return Finding("disk", "pass", said)


def checkpoint_size(config: RunConfig, folder: Path, plan: Plan | None) -> tuple[int, str]:
    """(bytes of a checkpoint, how that is known): the plan's, else that of one that is there, else a lower bound."""
    if plan is not None:
        return plan.checkpoint_bytes, f"PREDICTION of {plan.path.name}"
    whole = [path for path in step_folders(folder / "checkpoints").values() if incomplete_reason(path) is None]
    if whole:
        return _bytes_in(whole[-1]), f"as {whole[-1].name}"
    return least_bytes(config), "LOWER BOUND from the config"


def checkpoints_on_disk(config: RunConfig) -> int:
    """How many there are at most at one time: those that are kept, and the one being written."""
    leaf = config.checkpoints
    kept = leaf.keep_last + 1
    if leaf.keep_every_steps and config.run.max_steps:
        kept += config.run.max_steps // leaf.keep_every_steps
    return kept + (leaf.keep_best.count if leaf.keep_best else 0)


def least_bytes(config: RunConfig) -> int:
    """Of a checkpoint: weights in fp32 and optimizer states of the trunk and the towers whose sizes the config says."""
    trunk, audio, text = config.fusion.trunk, config.encoders.audio, config.encoders.text
    learned = frozen = 0
    if trunk is not None and trunk.weights is None:
        heads = trunk.resolved_head_dim * trunk.hidden_size * (2 * trunk.num_heads + 2 * trunk.num_kv_heads)
        layer = heads + 3 * trunk.hidden_size * trunk.intermediate_size
        embeddings = vocabulary(config) * trunk.hidden_size * (1 if trunk.tie_word_embeddings else 2)
        count = trunk.num_layers * layer + embeddings
        learned, frozen = (learned, frozen + count) if trunk.freeze else (learned + count, frozen)
    for tower in (audio, text):
        if tower is not None:
            layers = 0 if getattr(tower, "kind", "") == "mean" else tower.num_layers
            count = layers * 12 * tower.hidden_size**2
            learned, frozen = (learned, frozen + count) if tower.freeze else (learned + count, frozen)
    return 4 * (learned + frozen) + learned * _state_bytes(config)


def vocabulary(config: RunConfig) -> int:
    """Entries of the tokenizer, without added tokens; 0 where it is not here or cannot be read."""
    folder = local_folder(Reference("batches.tokenizer", config.batches.tokenizer, "tokenizer"))
    try:
        model = json.loads(((folder or Path()) / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        return len(model["vocab"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def _state_bytes(config: RunConfig) -> int:
    """Of the optimizer, for one element that learns."""
    states = _STATE_BYTES.get(config.engine.optimizer, 0)
    return states // 2 if config.engine.optimizer_states == "bf16" else states


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
