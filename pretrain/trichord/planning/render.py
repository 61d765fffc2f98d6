"""A plan as lines for a person. Sizes in GiB (2^30 bytes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trichord.planning.amounts import (
    amount_text,
    count_text,
    duration_text,
    seconds_text,
    size_text,
    table,
    wrapped,
)

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "master": "fp32 master",
    "moments": "optimizer states",
    "average": "average of weights",
    "backward": "gradients in flight",
    "gathered": "gathered at most",
    "in_backward": "sum in backward",
    "host": "on the host",
}
_LIMITS = {
    "gpu": "no layout fits the memory of a GPU",
    "host": "no layout fits the memory of a node (--host-gib)",
    "config": "the config allows no layout (engine.hpz_ranks, engine.sequence_parallel)",
}


def render_plan(facts: Mapping[str, Any], width: int | None = None) -> str:
    """All of it, prediction said first. width: characters of a line; None: as long as they are."""
    machine = f"{facts['gpus']} x {facts['gpu']['name']}"
    parts = [
        [f"PREDICTION for {facts['run']!r} on {machine}: computed from the config, not measured"],
        _parameter_lines(facts),
        _state_lines(facts, width),
        _memory_lines(facts),
        _row_lines(facts),
        _time_lines(facts, width),
        _communication_lines(facts, width),
        _best_lines(facts),
        _scaling_lines(facts, width),
        _checkpoint_lines(facts),
        ["assumed", *(f"  - {text}" for text in facts["assumptions"])],
        [f"not predicted: {', '.join(facts['not_predicted'])}"],
    ]
    return "\n\n".join("\n".join(wrapped(line, width) for line in part) for part in parts if part)


def _parameter_lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{'parameters':<18}{'trainable':>16}{'frozen':>16}"]
    for room, count in facts["parameters"].items():
        lines.append(f"  {room:<16}{count['trainable']:>16,}{count['frozen']:>16,}")
    return [*lines, f"  {'sum':<16}{facts['trainable']:>16,}{facts['frozen']:>16,}"]


def _state_lines(facts: Mapping[str, Any], width: int | None) -> list[str]:
    """A column for each stage."""
    chosen, stages = facts["chosen"], facts["states"]
    heads = [f"ZeRO-{stage}{'*' if int(stage) == chosen['zero_stage'] else ''}" for stage in stages]
    rows = [["", *heads]]
    for kind, label in _KINDS.items():
        if any(states[kind] for states in stages.values()):
            rows.append([label, *(size_text(states[kind]) for states in stages.values())])
    title = f"model states per GPU, {facts['precision']}, {facts['optimizer']}, offload {chosen['offload']} (* chosen)"
    return [title, *table(rows, width, left=1)]


def _memory_lines(facts: Mapping[str, Any]) -> list[str]:
    memory, activations, limit = facts["memory"], facts["activations"], facts["gpu"]["memory_gib"]
    verdict = "DOES NOT FIT" if "gpu" in memory["exceeds"] else "fits"
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
    return [*lines, _node_line(facts)]


def _node_line(facts: Mapping[str, Any]) -> str:
    memory, chosen = facts["memory"], facts["chosen"]
    line = f"memory of a node: {size_text(memory['host_bytes'])}"
    if memory["host_limit_bytes"] is None:
        return f"{line} (not compared: no --host-gib)"
    line += f" of {size_text(memory['host_limit_bytes'])} (--host-gib)"
    if "host" not in memory["exceeds"]:
        return f"{line}: fits"
    less = f", offload less (engine.offload is {chosen['offload']})" if chosen["offload"] != "none" else ""
    return f"{line}: DOES NOT FIT; {_less_on_host(facts)}{less}, or take nodes with more memory"


def _less_on_host(facts: Mapping[str, Any]) -> str:
    rows = facts["rows"]
    workers = f"batches.num_workers (now {rows['num_workers']}) or " if rows["num_workers"] else ""
    return f"lower {workers}batches.prefetch_steps (now {rows['prefetch_steps']})"


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


def _time_lines(facts: Mapping[str, Any], width: int | None) -> list[str]:
    time = facts["time"]
    lines = [f"time of a step: {seconds_text(time['step_s'])}, MFU {100 * time['mfu_frac']:.1f} %, "
             f"{facts['rows']['tokens_per_step'] / time['step_s']:,.0f} tokens/s"]  # fmt: skip
    rows = [["", "", ""]]
    for name in ("products", "attention", "elementwise", "launches", "exposed", "update", "offload"):
        if seconds := time[f"{name}_s"]:
            label = {"exposed": "communication that nothing hides"}.get(name, name)
            rows.append([label, seconds_text(seconds), f"{100 * seconds / time['step_s']:.0f} %"])
    lines += table(rows, width, left=1)[1:]
    flops = facts["flops"]["by_room"].items()
    lines.append("  model FLOPs: " + ", ".join(f"{room} {number:.3g}" for room, number in flops))
    return [*lines, *_cost_lines(facts["cost"], facts["rows"]["max_steps"])]


def _cost_lines(cost: Mapping[str, Any], steps: int | None) -> list[str]:
    if cost["days"] is None or steps is None:
        return ["whole run: run.max_steps is not set, so its length is not known"]
    length = duration_text(86_400 * cost["days"])
    line = f"whole run: {count_text(steps, 'step')}, {length}, {amount_text(cost['gpu_hours'])} GPU hours"
    if cost["cost"] is not None:
        line += f", {amount_text(cost['cost'])} at {cost['price_per_gpu_hour']:g} per GPU hour"
    return [line]


def _communication_lines(facts: Mapping[str, Any], width: int | None) -> list[str]:
    found = facts["communication"]
    if not found["collectives"]:
        return []
    rows = [["what", "kind", "bytes", "messages", "time", "beside"]]
    for c in found["collectives"]:
        beside = "" if c["beside"] == "nothing" else c["beside"]
        time = seconds_text(c["seconds"])
        rows.append([c["what"], c["op"], size_text(c["bytes"]), f"{c['messages']:,}", time, beside])
    lines = [f"communication per step: a GPU sends {size_text(found['sent_bytes'])}", *table(rows, width, left=2)]
    for advised in facts["advice"]:
        share = 100 * advised["latency_s"] / facts["time"]["step_s"]
        lines.append(
            f"  try {advised['set']}: {advised['why']}; latency of these {seconds_text(advised['latency_s'])}, "
            f"{share:.0f} % of a step; with it {seconds_text(advised['step_s'])} a step (PREDICTION)"
        )
    return lines


def _best_lines(facts: Mapping[str, Any]) -> list[str]:
    best = facts["best"]
    if best is None:
        return [f"best layout: none fits: {_why_none_fits(facts)}"]
    return [
        f"best layout that fits: zero_stage {best['zero_stage']}, micro_rows {best['micro_rows']} (accumulation "
        f"{best['accumulation']}), offload {best['offload']}, "
        f"activation_checkpointing {best['activation_checkpointing']}, sequence_parallel {best['sequence_parallel']}",
        f"  {seconds_text(best['step_s'])} a step, MFU {100 * best['mfu_frac']:.1f} %, "
        f"{size_text(best['device_bytes'])} per GPU; --save FILE.json writes it as FILE.overlay.yaml",
    ]


def _why_none_fits(facts: Mapping[str, Any]) -> str:
    missing = facts["none_fits"]
    if missing["limit"] == "config":
        return f"{_LIMITS['config']} on {count_text(facts['gpus'], 'GPU')}"
    least = size_text(missing["least_bytes"])
    if missing["limit"] == "host":
        there = size_text(facts["memory"]["host_limit_bytes"])
        return (f"the most modest one that fits the GPUs needs {least} of host memory in a node, which has {there} "
                f"(--host-gib), with and without offload; {_less_on_host(facts)}, or take nodes with more memory or "
                "fewer GPUs (--gpus-per-node)")  # fmt: skip
    return (f"the most modest one needs {least} on a GPU of {facts['gpu']['memory_gib']} GiB; take more or larger "
            "GPUs, or a shorter batches.row_tokens")  # fmt: skip


def _scaling_lines(facts: Mapping[str, Any], width: int | None) -> list[str]:
    """The same global batch on other numbers of GPUs."""
    useful = facts["largest_useful_gpus"]
    rows = [["GPUs", "ZeRO", "rows", "accum", "offload", "recompute", "shared", "idle", "step", "MFU", "run", "cost"]]
    for outcome in filter(None, facts["scaling"]):
        cost, shared, idle = outcome["cost"], outcome["sequence_parallel"], outcome["idle_ranks"]
        rows.append([
            f"{'*' if outcome['gpus'] == useful else ''}{outcome['gpus']}",
            str(outcome["zero_stage"]),
            str(outcome["micro_rows"]),
            str(outcome["accumulation"]),
            outcome["offload"],
            outcome["activation_checkpointing"],
            "" if shared == 1 else str(shared),
            str(idle or ""),
            seconds_text(outcome["step_s"]),
            f"{100 * outcome['mfu_frac']:.1f} %",
            "" if cost["days"] is None else duration_text(86_400 * cost["days"]),
            "" if cost["cost"] is None else amount_text(cost["cost"]),
        ])  # fmt: skip
    title = "scaling, the same global batch, each with its best layout"
    lines = [f"{title} (* largest useful)", *table(rows, width)] if useful is not None else [title]
    return [*lines, *_past_useful(facts), *_not_fitting(facts)]


def _past_useful(facts: Mapping[str, Any]) -> list[str]:
    """Why more GPUs than the largest useful number gain little."""
    useful, rows = facts["largest_useful_gpus"], facts["rows"]["rows_per_step"]
    larger = [outcome for outcome in facts["scaling"] if outcome is not None and outcome["gpus"] > (useful or 0)]
    if useful is None or not larger:
        return []
    lines, after = [], larger[0]
    if after["gpus"] <= rows:
        share = 100 * after["exposed_s"] / after["step_s"]
        lines.append(
            f"  past {count_text(useful, 'GPU')} a step is hardly shorter: on {after['gpus']} each has "
            f"{count_text(-(-rows // after['gpus']), 'row')} of a step, and communication that nothing hides is "
            f"{share:.0f} % of it"
        )
    if larger[-1]["gpus"] > rows:
        lines.append(
            f"  past {count_text(rows, 'GPU')} the run has too few rows per step (batches.rows_per_step={rows}): GPUs "
            "share rows or idle"
        )
    return lines


def _not_fitting(facts: Mapping[str, Any]) -> list[str]:
    limits: list[str | None] = facts["scaling_limits"]
    sizes = {limit: [2**power for power, found in enumerate(limits) if found == limit] for limit in _LIMITS}
    return [f"  on {_sizes_text(found)}: {_LIMITS[limit]}" for limit, found in sizes.items() if found]


def _sizes_text(sizes: list[int]) -> str:
    """Powers of two; neighbours, three or more, by the first and the last."""
    if len(sizes) > 2 and sizes[-1] == sizes[0] << len(sizes) - 1:
        return f"{sizes[0]} to {sizes[-1]:,} GPUs"
    return ", ".join(map(str, sizes)) + (" GPU" if sizes == [1] else " GPUs")


def _checkpoint_lines(facts: Mapping[str, Any]) -> list[str]:
    checkpoint = facts["checkpoint"]
    return [
        f"checkpoint        {size_text(checkpoint['bytes'])}, {size_text(checkpoint['per_rank_bytes'])} written per "
        f"rank, {size_text(checkpoint['kept_bytes'])} of disk while the oldest is replaced"
    ]
