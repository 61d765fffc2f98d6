"""A plan as lines for a person. Sizes in GiB (2^30 bytes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trichord.planning.memory import GIB

_KINDS = ("weights", "gradients", "master", "moments", "average", "backward", "gathered", "in_backward", "host")


def render_plan(facts: Mapping[str, Any]) -> str:
    """All of it, prediction said first."""
    gpu = facts["gpu"]
    parts = [
        [f"PREDICTION for {facts['run']!r} on {facts['gpus']} x {gpu['name']}: computed from the config, not measured"],
        _parameter_lines(facts),
        _state_lines(facts),
        _memory_lines(facts),
        _row_lines(facts),
        _time_lines(facts),
        _communication_lines(facts),
        _best_lines(facts),
        _scaling_lines(facts),
        _checkpoint_lines(facts),
        ["assumed", *(f"  - {text}" for text in facts["assumptions"])],
        [f"not predicted: {', '.join(facts['not_predicted'])}"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _parameter_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{'parameters':<18}{'trainable':>16}{'frozen':>16}"]
    for room, count in facts["parameters"].items():
        lines.append(f"  {room:<16}{count['trainable']:>16,}{count['frozen']:>16,}")
    return [*lines, f"  {'sum':<16}{facts['trainable']:>16,}{facts['frozen']:>16,}"]


def _state_lines(facts: Mapping[str, Any]) -> list[str]:
    chosen = facts["chosen"]
    kinds = [kind for kind in _KINDS if any(states[kind] for states in facts["states"].values())]
    title = f"model states per GPU, {facts['precision']}, {facts['optimizer']}, offload {chosen['offload']}"
    lines = [title, f"  {'':<8}" + "".join(f"{kind.replace('in_', 'in '):>12}" for kind in kinds)]
    for stage, states in facts["states"].items():
        mark = " <- chosen" if int(stage) == chosen["zero_stage"] else ""
        cells = "".join(f"{size_text(states[kind]):>12}" for kind in kinds)
        lines.append(f"  {'ZeRO-' + str(stage):<8}{cells}{mark}")
    return lines


def _memory_lines(facts: Mapping[str, Any]) -> list[str]:
    memory, activations, limit = facts["memory"], facts["activations"], facts["gpu"]["memory_gib"]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    full = size_text(memory["device_bytes"])
    lines = [f"memory per GPU, at its fullest ({memory['moment']}): {full} of {limit} GiB: {verdict}"]
    for name in ("states", "activations", "block", "loss", "context", "fragmentation"):
        if memory[name]:
            note = {"block": "one block recomputed", "loss": "logits of a chunk, gradient of the vocabulary"}.get(name)
            lines.append(f"  {name:<16}{size_text(memory[name]):>12}" + (f"   {note}" if note else ""))
    rooms = ", ".join(f"{room} {size_text(size)}" for room, size in activations["by_room"].items() if size)
    lines.append(f"  of a typical micro-batch: {rooms}")
    if activations["heaviest_source"]:
        lines.append(
            f"  heaviest rows: {activations['heaviest_source']}, {activations['heaviest_ratio']:.2f} times that"
        )
    return [*lines, f"memory of a node: {size_text(memory['host_bytes'])}"]


def _row_lines(facts: Mapping[str, Any]) -> list[str]:
    rows = facts["rows"]
    tokens = f"{rows['row_tokens']:,} tokens = {rows['tokens_per_step']:,} tokens"
    where = "GPU" if rows["sequence_parallel"] == 1 else f"group of {rows['sequence_parallel']} GPUs that share them"
    lines = [
        f"rows per step     {rows['rows_per_step']} of {tokens}, {100 * rows['useful_frac']:.0f} % of them useful",
        f"micro-steps       {rows['accumulation']} of batches.micro_rows={rows['micro_rows']} on every {where}",
    ]
    row = facts["workload"]["row"]
    lines.append(f"a row holds       {row['images']:.1f} images, {row['clips']:.1f} clips of {row['audio_tokens']:.0f} "
                 f"tokens in all, {row['labels']:.0f} labels")  # fmt: skip
    if rows["wasted_frac"] > 0:
        lines.append(f"empty rows        {100 * rows['wasted_frac']:.1f} % of what is computed")
    if rows["idle_ranks"]:
        lines.append(f"idle GPUs         {rows['idle_ranks']}: there are fewer rows than GPUs")
    if rows["better_micro_rows"]:
        better = 100 * rows["better_wasted_frac"]
        lines.append(f"better            batches.micro_rows={rows['better_micro_rows']} leaves {better:.1f} % empty")
    return lines


def _time_lines(facts: Mapping[str, Any]) -> list[str]:
    time = facts["time"]
    lines = [f"time of a step: {seconds_text(time['step_s'])}, MFU {100 * time['mfu_frac']:.1f} %, "
             f"{facts['rows']['tokens_per_step'] / time['step_s']:,.0f} tokens/s"]  # fmt: skip
    for name in ("products", "attention", "elementwise", "launches", "exposed", "update", "offload"):
        if seconds := time[f"{name}_s"]:
            label = {"exposed": "communication that nothing hides"}.get(name, name)
            lines.append(f"  {label:<34}{seconds_text(seconds):>10}{100 * seconds / time['step_s']:>6.0f} %")
    lines.append(
        "  model FLOPs: " + ", ".join(f"{room} {flops:.3g}" for room, flops in facts["flops"]["by_room"].items())
    )
    return [*lines, *_cost_lines(facts["cost"], facts["rows"]["max_steps"])]


def _cost_lines(cost: Mapping[str, Any], steps: int | None) -> list[str]:
    if cost["days"] is None:
        return ["whole run: run.max_steps is not set, so its length is not known"]
    line = f"whole run: {steps:,} steps, {cost['days']:,.2f} days, {cost['gpu_hours']:,.0f} GPU hours"
    if cost["cost"] is not None:
        line += f", {cost['cost']:,.0f} at {cost['price_per_gpu_hour']:g} per GPU hour"
    return [line]


def _communication_lines(facts: Mapping[str, Any]) -> list[str]:
    found = facts["communication"]
    if not found["collectives"]:
        return []
    lines = [f"communication per step: a GPU sends {size_text(found['sent_bytes'])}"]
    for c in found["collectives"]:
        beside = "" if c["beside"] == "nothing" else f", beside the {c['beside']} pass"
        lines.append(
            f"  {c['what']:<20}{c['op']:<16}{size_text(c['bytes']):>12}{seconds_text(c['seconds']):>10}{beside}"
        )
    return lines


def _best_lines(facts: Mapping[str, Any]) -> list[str]:
    best = facts["best"]
    if best is None:
        return [f"best layout: none fits {facts['gpus']} GPUs of {facts['gpu']['memory_gib']} GiB; take more or larger "
                "GPUs, or a shorter batches.row_tokens"]  # fmt: skip
    return [
        f"best layout that fits: zero_stage {best['zero_stage']}, micro_rows {best['micro_rows']} (accumulation "
        f"{best['accumulation']}), offload {best['offload']}, "
        f"activation_checkpointing {best['activation_checkpointing']}, sequence_parallel {best['sequence_parallel']}",
        f"  {seconds_text(best['step_s'])} a step, MFU {100 * best['mfu_frac']:.1f} %, "
        f"{size_text(best['device_bytes'])} per GPU; --save FILE.json writes it as FILE.overlay.yaml",
    ]


def _scaling_lines(facts: Mapping[str, Any]) -> list[str]:
    """The same global batch on other numbers of GPUs."""
    lines = ["scaling, the same global batch, each with its best layout",
             f"  {'GPUs':>6}{'ZeRO':>6}{'rows':>6}{'accum':>7}{'offload':>11}{'recompute':>11}{'shared':>8}{'step':>10}"
             f"{'MFU':>7}{'days':>9}{'cost':>12}"]  # fmt: skip
    for outcome in facts["scaling"]:
        if outcome is None:
            continue
        cost = outcome["cost"]
        days = "" if cost["days"] is None else f"{cost['days']:,.1f}"
        price = "" if cost["cost"] is None else f"{cost['cost']:,.0f}"
        idle = f"   {outcome['idle_ranks']} idle" if outcome["idle_ranks"] else ""
        lines.append(
            f"  {outcome['gpus']:>6}{outcome['zero_stage']:>6}{outcome['micro_rows']:>6}{outcome['accumulation']:>7}"
            f"{outcome['offload']:>11}{outcome['activation_checkpointing']:>11}"
            f"{outcome['sequence_parallel']:>8}{seconds_text(outcome['step_s']):>10}"
            f"{100 * outcome['mfu_frac']:>5.1f} %{days:>9}{price:>12}{idle}"
        )
    missing = sum(outcome is None for outcome in facts["scaling"])
    return [*lines, f"  on fewer GPUs no layout fits ({missing} sizes)"] if missing else lines


def _checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    checkpoint = facts["checkpoint"]
    return [
        f"checkpoint        {size_text(checkpoint['bytes'])}, {size_text(checkpoint['per_rank_bytes'])} written per "
        f"rank, {size_text(checkpoint['kept_bytes'])} of disk while the oldest is replaced"
    ]


def size_text(size: float) -> str:
    if size == 0:
        return "0"
    if size >= GIB:
        return f"{size / GIB:,.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def seconds_text(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
