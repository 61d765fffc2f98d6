"""All that can be checked on a login node: without torch, without an allocation, writing nothing that stays."""

from __future__ import annotations

import os
from collections.abc import Callable

from trichord.core.errors import TrichordError
from trichord_launch.job_size import require_groups, size_warnings
from trichord_launch.preflight.checkpoint import check_checkpoint
from trichord_launch.preflight.fetch import fetch
from trichord_launch.preflight.finding import Finding, of_error
from trichord_launch.preflight.folders import check_folders
from trichord_launch.preflight.models import check_models, references
from trichord_launch.preflight.plan_file import Plan
from trichord_launch.preflight.plan_findings import check_plan, usable_plan
from trichord_launch.preflight.port import check_port
from trichord_launch.preflight.request import Loaded
from trichord_launch.preflight.samples import check_samples
from trichord_launch.preflight.shards import SourceFacts, check_shards
from trichord_launch.preflight.space import check_space
from trichord_launch.preflight.wandb import check_wandb


def check_login_node(loaded: Loaded) -> tuple[list[Finding], list[SourceFacts]]:
    """Findings in the order in which a run would meet what they speak of, and what is known of the shards."""
    config, request, plan = loaded.config, loaded.request, usable_plan(loaded)
    findings = [Finding("config", "pass", f"{request.config} is the run {config.run.name!r}"), *check_plan(loaded)]
    findings += _ranks(loaded, plan)
    findings += _guarded("run folder", lambda: check_folders(config))
    findings += check_checkpoint(config)
    shards, sources = check_shards(config)
    findings += shards
    findings += _guarded("samples", lambda: check_samples(config, sources))
    if request.fetch:
        findings += fetch(references(config))
    findings += check_models(config, request.config)
    findings += _guarded("disk", lambda: [check_space(config, plan, request.run_words)])
    findings.append(check_wandb(config))
    if not request.wants_nodes:  # the first node's is the one that counts
        findings.append(check_port(request.port, {**os.environ, **(loaded.cluster.env if loaded.cluster else {})}))
    return findings, sources


def _ranks(loaded: Loaded, plan: Plan | None) -> list[Finding]:
    """Whether groups divide the ranks, and each has a row; no line where their number is not known."""
    ranks = loaded.asked_ranks or (plan.gpus if plan is not None else None)
    if ranks is None:
        return []
    try:
        require_groups(loaded.config, ranks)
    except TrichordError as error:
        return [of_error("ranks", error, "start a multiple of it")]
    per_node = loaded.cluster.gpus_per_node if loaded.cluster is not None else ranks
    warnings = [said.rpartition("; ") for said in size_warnings(loaded.config, ranks, per_node)]
    rows = loaded.config.batches.rows_per_step
    return [Finding("ranks", "warn", what, remedy, "config") for what, _, remedy in warnings] or [
        Finding("ranks", "pass", f"{ranks}, with {rows} rows of each step to share")
    ]


def _guarded(check: str, work: Callable[[], list[Finding]]) -> list[Finding]:
    """An error of ours is a finding; a bug keeps its traceback."""
    try:
        return work()
    except TrichordError as error:
        return [of_error(check, error, "see the message")]
