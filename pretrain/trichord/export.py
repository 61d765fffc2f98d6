"""The story of an export: a checkpoint becomes a folder in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from trichord.release.export import export_checkpoint
from trichord.restore import restore


def export(path: Path, out: Path, ema: bool = False) -> Path:
    """Write the newest checkpoint of a run folder, or one checkpoint folder, to `out` (not there yet); returns it.

    ema: the average of its weights instead.

    Raises:
        CheckpointError: there is none, it is damaged, or this version cannot build its model.
    """
    restored = restore(path, ema)
    weights = dict(restored.model.named_parameters())
    facts = {"run": restored.config.run.name, "step": restored.step}
    if ema:
        facts["weights"] = f"their moving average (decay {restored.config.engine.ema_decay})"
    return export_checkpoint(weights, restored.config, restored.tokenizer, out, facts=facts)
