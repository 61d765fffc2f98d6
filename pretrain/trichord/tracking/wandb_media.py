"""What Weights & Biases gets beside metrics: tables of samples, and artifacts that only say where something lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trichord.core.log import get_logger

_logger = get_logger(__name__)

TABLE_COLUMNS = ("step", "source", "image", "audio", "given", "wanted", "predicted", "right_frac")


@dataclass(frozen=True)
class Reference:
    """An artifact that holds no bytes. uri: `file:///...`, or where a mirror has it."""

    name: str
    kind: str
    uri: str
    aliases: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


def sample_table(folder: Path, lines: Sequence[Mapping[str, Any]]) -> Any:
    """Lines of `previews.jsonl` as a table with pictures and players, of each sample the first picture and clip."""
    import wandb

    table = wandb.Table(columns=list(TABLE_COLUMNS))
    for line in lines:
        image, clip = _first(folder, line["images"]), _first(folder, line["clips"])
        cells = {
            **line,
            "image": wandb.Image(str(image)) if image is not None else None,
            "audio": wandb.Audio(str(clip)) if clip is not None else None,
        }
        table.add_data(*(cells[name] for name in TABLE_COLUMNS))
    return table


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((path for name in names if (path := folder / name).is_file()), None)


def log_reference(run: Any, reference: Reference) -> None:
    """Log an artifact version. Nothing is read or hashed: its files' places and sizes are what W&B is told.

    A storage whose client is not installed here is named in the artifact's facts, and the artifact has no entry.
    """
    import wandb

    artifact = wandb.Artifact(reference.name, reference.kind, metadata={**reference.facts, "uri": reference.uri})
    try:
        artifact.add_reference(reference.uri, checksum=False)
    except Exception as error:  # W&B asks for boto3 or google-cloud-storage, which we do without
        if reference.uri.startswith("file://"):
            raise
        _logger.info("wandb cannot refer to %s (%s); its place is in the artifact's metadata", reference.uri, error)
    run.log_artifact(artifact, aliases=list(reference.aliases))
