"""Released weights from disk into a module: safetensors only, one tensor at a time, no key dropped in silence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.layers.initial import skips_initial_values

_INDEX = "model.safetensors.index.json"
_PART = re.compile(r"-\d+-of-\d+\.safetensors$")


class StoredWeights(Mapping[str, Tensor]):
    """Tensors by name that are read when they are asked for, and not kept: a model need not be in memory twice."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]):
        """shapes: of all tensors; read: one of them."""
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def renamed(self, rename: Callable[[str], str | None]) -> StoredWeights:
        """The same tensors under other names; None leaves one out."""
        old_names = {new: name for name in self.shapes if (new := rename(name)) is not None}
        shapes = {new: self.shapes[name] for new, name in old_names.items()}
        return StoredWeights(shapes, lambda new: self[old_names[new]])


def read_safetensors(path: Path | str) -> StoredWeights:
    """All tensors of a `.safetensors` file, or of a folder that holds `model.safetensors` or its sharded form.

    Raises:
        ConfigError: nothing of the kind is there, a part of it is not, or a file cannot be read.
    """
    path = Path(path)
    shapes: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in [path] if path.is_file() else _folder_files(path):
        found = _shapes_in(file)
        shapes |= found
        places |= dict.fromkeys(found, file)
    return StoredWeights(shapes, lambda name: _read_tensor(places[name], name))


def _folder_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        return _indexed_files(folder)
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    parts = [file.name for file in found if _PART.search(file.name)]
    if parts:
        raise ConfigError(
            f"{folder} holds weights in parts ({parts[0]}, ...) without {_INDEX}, which names them all; "
            "copy it too, or fetch the folder again"
        )
    if len(found) == 1:
        return found
    raise ConfigError(
        f"expected a .safetensors file, or a folder with model.safetensors, at {folder}; "
        f"found {[f.name for f in found] or 'nothing'}; pickled weights (.bin, .pt) are not read"
    )


def _indexed_files(folder: Path) -> list[Path]:
    """The parts that an index names, all of them there."""
    try:
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        # Only the last part of a name: an index may not point outside its own folder.
        files = sorted({folder / Path(name).name for name in names})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / _INDEX} is no index of weights ({type(error).__name__}: {error}); fetch it again"
        ) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {missing[0]}: {len(missing)} of the {len(files)} parts that {_INDEX} names are missing; "
            "copy them too, or fetch the folder again"
        )
    return files


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights {file}: {error}; check the file or fetch it again") from error


def _read_tensor(file: Path, name: str) -> Tensor:
    """Opened anew for each tensor: what an open file has mapped counts as this process's memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as tensors:
            return tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights {file}: {error}; check the file or fetch it again") from error


def load_into(module: nn.Module, weights: StoredWeights, source: str) -> None:
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
        f"{k} {weights.shapes[k]} in the file, {tuple(own[k].shape)} here"
        for k in own
        if weights.shapes[k] != tuple(own[k].shape)
    ]
    if shapes:
        raise ConfigError(
            f"weights {source} do not fit the configured model: {'; '.join(shapes[:3])}"
            f"{' and more' if len(shapes) > 3 else ''}; change the configured sizes"
        )
    for name, tensor in own.items():  # a view on the module's own
        tensor.copy_(weights[name])


def needs_no_weights(module: nn.Module) -> bool:
    """Whether reading released weights into it would be of no use: it was built on the meta device, for its shapes
    only, or all its weights will be overwritten."""
    return skips_initial_values() or any(parameter.is_meta for parameter in module.parameters())
