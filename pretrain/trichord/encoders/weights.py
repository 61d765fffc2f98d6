"""Released weights from disk into a module: safetensors only, and no key is dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from trichord.core.errors import ConfigError

_INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, or of a folder that holds `model.safetensors` or its sharded form.

    Raises:
        ConfigError: nothing of the kind is there, or a file cannot be read.
    """
    path = Path(path)
    files = [path] if path.is_file() else _folder_files(path)
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(_read_file(file))
    return weights


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        names = json.loads((folder / _INDEX).read_text())["weight_map"].values()
        # Only the last part of a name: an index may not point outside its own folder.
        return sorted({folder / Path(name).name for name in names})
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if len(found) == 1:
        return found
    raise ConfigError(
        f"expected a .safetensors file, or a folder with model.safetensors, at {folder}; "
        f"found {[f.name for f in found] or 'nothing'}; pickled weights (.bin, .pt) are not read"
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights {file}: {error}; check the file or fetch it again") from error


def load_into(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `module`; names and shapes must fit exactly.

    Raises:
        ConfigError: naming missing and unexpected keys, or the first shapes that differ.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise ConfigError(
            f"weights {source} do not fit the configured model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}; configure the model they were made for"
        )
    shapes = [
        f"{k} {tuple(weights[k].shape)} in the file, {tuple(own[k].shape)} here"
        for k in own
        if weights[k].shape != own[k].shape
    ]
    if shapes:
        raise ConfigError(
            f"weights {source} do not fit the configured model: {'; '.join(shapes[:3])}"
            f"{' and more' if len(shapes) > 3 else ''}; change the configured sizes"
        )
    module.load_state_dict(weights)


def is_meta(module: nn.Module) -> bool:
    """Whether the module was built on the meta device: shapes only, so weights are not read."""
    return any(parameter.is_meta for parameter in module.parameters())
