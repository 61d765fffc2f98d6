"""`trichord track sync`: one clean Weights & Biases run, rebuilt from the files of a run folder. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from trichord.core.errors import ConfigError, TrichordError
from trichord.tracking.config import WandbConfig
from trichord.tracking.metrics import merge_steps, read_events, read_metrics
from trichord.tracking.previews import read_previews
from trichord.tracking.references import References
from trichord.tracking.wandb import Mode, new_id, open_run, read_identity, resolve_mode, write_identity
from trichord.tracking.wandb_media import Reference, log_reference, sample_table
from trichord.tracking.wandb_service import end_service

_UPLOAD_TIMEOUT_S = 3600.0  # somebody waits for it, and can end it


@dataclass(frozen=True)
class SyncResult:
    """What `sync_run` made. rows: steps; location: the run's URL, or the folder of an offline run."""

    run_id: str
    mode: Mode
    rows: int
    location: str
    tables: int = 0
    artifacts: int = 0


def sync_run(
    folder: Path, *, mode: Literal["auto", "online", "offline"] = "auto", run_id: str | None = None
) -> SyncResult:
    """Rebuild one W&B run of a run folder from its record: `trichord track sync RUN`.

    Rows of one step are merged and keep their times. Tables of samples, and artifacts of checkpoints and models that
    are still there, go with them; alerts and system metrics do not. Offline it writes `wandb/offline-run-*` in the run
    folder, for `wandb sync` on a machine with network. run_id: None takes the run's own id, so that online only the
    steps W&B does not have yet are added; give a new id for a fresh copy.

    Raises:
        ConfigError: the folder has no metrics.
        TrichordError: W&B refuses or cannot be reached.
    """
    folder = Path(folder)
    rows = merge_steps(read_metrics(folder))
    if not rows:
        raise ConfigError(f"{folder} has no metrics.jsonl with metrics; expected the folder of a run that has trained")
    resolved = _resolved_config(folder)
    config = WandbConfig(**resolved.get("tracking", {}).get("wandb", {}))
    wanted = "online" if resolve_mode(mode) == "online" else "offline"
    wandb_id: str = run_id or read_identity(folder).get("id") or new_id()
    try:
        identity = {"id": wandb_id, "resume": "allow"}
        run = open_run(wanted, config, folder, folder.name, resolved, upload_timeout_s=_UPLOAD_TIMEOUT_S, **identity)
        for row in rows:
            metrics = {name: value for name, value in row.items() if name != "time"}
            run.log({**metrics, "_timestamp": row.get("time", 0.0)}, step=row["step"])
        tables, artifacts = _sync_tables(run, folder), _sync_artifacts(run, folder, resolved)
        location = run.url if wanted == "online" else str(Path(run.dir).parent)
        run.finish()
    except Exception as error:
        end_service()
        raise TrichordError(f"wandb could not take the run ({type(error).__name__}: {error})") from error
    write_identity(folder, wandb_id, "step")
    return SyncResult(wandb_id, wanted, len(rows), location or "", tables, artifacts)


def _sync_tables(run: Any, folder: Path) -> int:
    """The tables of samples, each with the number of its step; behind the rows, since W&B's steps only go up."""
    lines = read_previews(folder)
    steps = sorted({line["step"] for line in lines})
    for step in steps:
        table = sample_table(folder, [line for line in lines if line["step"] == step])
        run.log({"previews": table, "step": step})
    return len(steps)


def _sync_artifacts(run: Any, folder: Path, resolved: Mapping[str, Any]) -> int:
    """References to the checkpoints and exported models that the events name and that are still there."""
    references = References(folder, folder.name, resolved)
    wanted: dict[str, Reference | None] = {}
    for event in read_events(folder):
        kind, step = event.get("kind"), event.get("step")
        if not isinstance(step, int):
            continue
        if kind == "checkpoint" or (kind == "end" and event.get("checkpoint_saved")):
            final = bool(event.get("finished"))
            wanted[f"{kind} {step}"] = references.checkpoint(step, final=final)
        elif kind == "mirror" and event.get("ok"):
            wanted[f"{kind} {step}"] = references.checkpoint(step, mirrored=True)
        elif kind == "export":
            wanted[f"export {event.get('out')}"] = references.model(
                Path(str(event.get("out"))), step, bool(event.get("ema"))
            )
    found = [reference for reference in wanted.values() if reference is not None]
    for reference in found:
        log_reference(run, reference)
    return len(found)


def _resolved_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
    return values if isinstance(values, dict) else {}
