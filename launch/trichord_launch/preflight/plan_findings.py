"""Whether a plan is one of this run: its figures are used only where it is."""

from __future__ import annotations

from dataclasses import replace

from trichord_launch.preflight.finding import Finding
from trichord_launch.preflight.plan_file import Plan
from trichord_launch.preflight.request import Loaded

_GIB = 2**30
_NAMED = 4  # differing keys that are spelt out


def usable_plan(loaded: Loaded) -> Plan | None:
    """The plan where it is of this run and config; without the memory of a rank where it is for other numbers of
    them."""
    plan = loaded.plan
    if plan is None or _refusal(loaded, plan) is not None:
        return None
    return plan if loaded.asked_ranks in (None, plan.gpus) else replace(plan, device_bytes=None)


def check_plan(loaded: Loaded) -> list[Finding]:
    """What is not this run's in the plan; else whether it fits the memory of the cluster's GPUs."""
    plan, cluster = loaded.plan, loaded.cluster
    if plan is None:
        return []
    ranks = loaded.asked_ranks
    again = f"trichord plan {loaded.request.run_words} --gpus {ranks or plan.gpus} --save {plan.path.name}"
    if refusal := _refusal(loaded, plan):
        return [Finding("plan", "warn", f"{plan.path} {refusal}: its figures are not used", again, "config")]
    if ranks not in (None, plan.gpus):
        said = f"{plan.path} is of run {plan.run!r} on {plan.gpus} GPUs, not {ranks}: its memory of a rank is not used"
        return [Finding("plan", "warn", said, again, "config")]
    gpu = cluster.gpu if cluster is not None else None
    if plan.device_bytes is None or gpu is None:
        return [Finding("plan", "pass", f"{plan.path.name}, of this run and config on {plan.gpus} GPUs")]
    said = f"a rank needs {plan.device_bytes / _GIB:.1f} GiB (PREDICTION), a {gpu.name} has {gpu.memory_gib:.1f}"
    if plan.device_bytes / _GIB > gpu.memory_gib:
        remedy = "a higher engine.zero_stage, fewer batches.micro_rows, activation checkpointing, or more GPUs"
        return [Finding("plan", "fail", said, remedy, "config")]
    return [Finding("plan", "pass", said)]


def _refusal(loaded: Loaded, plan: Plan) -> str | None:
    """Why the plan says nothing of this run; None where it does."""
    if plan.run != loaded.config.run.name:
        return f"is of run {plan.run!r} on {plan.gpus} GPUs"
    if plan.keys is None:
        return "does not say of which config it is (an older version made it)"
    differing = plan.differing(loaded.config)
    if not differing:
        return None
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return f"is of another config ({'; '.join(differing[:_NAMED])}{more})"
