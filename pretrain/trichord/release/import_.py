"""`run.init_from`: a new run starts from the weights of an export, a checkpoint, or a hub repository.

FOLDER                      an export folder, a checkpoint folder, or a run folder (its newest checkpoint)
hub-id@revision             an export on the Hugging Face hub, or in its local cache; code from there is never run
...#vision,audio            only these rooms: of vision, audio, text, connector, trunk, heads
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from trichord.checkpoints.load import resolve_checkpoint
from trichord.checkpoints.slices import SliceReader
from trichord.core.errors import CheckpointError, ConfigError
from trichord.core.log import get_logger
from trichord.encoders.weights import StoredWeights, read_safetensors
from trichord.fusion.model import ROOMS, Trichord, param_room
from trichord.layers.stored import stored_tensors
from trichord.release.coverage import CoverageReport, compare

log = get_logger(__name__)

_PREFIX = "model."  # transformers' wrapper around our names
_HUB_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


def load_initial_weights(model: Trichord, source: str) -> CoverageReport:
    """Copy the weights that `source` names into `model`, and log what was and what was not covered.

    Raises:
        ConfigError: nothing is there, or a room does not exist.
        CheckpointError: without rooms named: any parameter is missing, left over or of another shape; with them: any
            parameter of those rooms is missing or of another shape.
    """
    place, rooms = parse_source(source)
    weights = load_init_weights(place)
    own = stored_tensors(model)
    if rooms:
        own = {name: tensor for name, tensor in own.items() if param_room(name) in rooms}
        weights = weights.renamed(lambda name: name if _room_or_none(name) in rooms else None)
    report = compare({name: tuple(tensor.shape) for name, tensor in own.items()}, weights.shapes)
    if not report.complete:
        raise CheckpointError(
            f"run.init_from {source!r} does not fit the configured model: {report.summary()}. "
            f"Configure the same model, or take only the rooms that are the same, such as {place}#vision,audio"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
    others = sorted({param_room(name) for name, _ in model.named_parameters()} - set(rooms)) if rooms else []
    log.info(
        "started from %s: %s%s", source, report.summary(), f"; new weights in {', '.join(others)}" if others else ""
    )
    return report


def parse_source(source: str) -> tuple[str, tuple[str, ...]]:
    """`PLACE#room,room` -> (PLACE, rooms); no rooms named: all, as an empty tuple."""
    place, _, names = source.partition("#")
    rooms = tuple(name.strip() for name in names.split(",") if name.strip())
    wrong = [room for room in rooms if room not in ROOMS]
    if wrong:
        raise ConfigError(f"run.init_from {source!r}: {wrong[0]!r} is no room; expected some of {', '.join(ROOMS)}")
    return place, rooms


def require_source(source: str) -> None:
    """Raises ConfigError: no such room, or nothing that could be looked at is named. The hub is not asked."""
    place, _ = parse_source(source)
    if not Path(place).expanduser().exists():
        _require_hub_name(place)


def load_init_weights(place: str) -> StoredWeights:
    """Every parameter of an export or checkpoint by its name in `Trichord`, read one by one.

    Raises:
        ConfigError: nothing is there, or it is something else.
        CheckpointError: a checkpoint is there but incomplete.
    """
    folder = Path(place).expanduser()
    if not folder.exists():
        folder = _fetch(place)
    if (folder / "config.json").is_file():
        _require_trichord(folder)
        return read_safetensors(folder).renamed(lambda name: name.removeprefix(_PREFIX))
    reader = SliceReader(resolve_checkpoint(folder))
    return StoredWeights(reader.shapes, reader.read_full)


def _require_trichord(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"run.init_from: {folder / 'config.json'} is no transformers config ({type(error).__name__}: {error}); "
            "export again, or fetch it again"
        ) from error
    if kind != "trichord":
        raise ConfigError(
            f"run.init_from {folder} is a {kind!r} model; a whole run starts from a Trichord export. "
            "Released towers and trunks go into encoders.vision.weights, encoders.audio.weights, fusion.trunk.weights"
        )


def _require_hub_name(place: str) -> tuple[str, str]:
    """(name, revision) on the hub."""
    name, _, revision = place.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(
            f"run.init_from: expected an export, checkpoint or run folder, or hub-id@revision; nothing is at {place!r}"
        )
    return name, revision


def _fetch(place: str) -> Path:
    """A snapshot of a hub repository, from the cache where there is no internet."""
    name, revision = _require_hub_name(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"run.init_from: {place!r} is no folder, and the Hugging Face hub gave no such model "
            f"({type(error).__name__}); check the name, or fetch it where there is "
            "internet: trichord-launch preflight CONFIG --fetch"
        ) from error


def _room_or_none(name: str) -> str | None:
    try:
        return param_room(name)
    except ValueError:
        return None
