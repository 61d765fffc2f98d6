"""The story of an export: a checkpoint becomes a folder in Hugging Face format."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from trichord.layers.stored import stored_tensors
from trichord.release.export import export_checkpoint
from trichord.restore import restore
from trichord.tracking.metrics import EVENTS_FILE, append_event


def export(path: Path, out: Path, ema: bool = False) -> Path:
    """Write the newest checkpoint of a run folder, or one checkpoint folder, to `out` (not there yet); returns it.

    ema: the average of its weights instead.

    Raises:
        CheckpointError: there is none, it is damaged, or this version cannot build its model.
    """
    restored = restore(path, ema)
    weights = stored_tensors(restored.model)
    facts = {"run": restored.config.run.name, "step": restored.step}
    if ema:
        facts["weights"] = f"their moving average (decay {restored.config.engine.ema_decay})"
    written = export_checkpoint(weights, restored.config, restored.tokenizer, out, facts=facts)
    run_folder = restored.folder.resolve().parents[1]
    if (run_folder / EVENTS_FILE).is_file():  # `trichord track sync` finds it there
        with suppress(OSError):
            append_event(run_folder, "export", step=restored.step, attempt=0, out=out.resolve(), ema=ema)
    return written
