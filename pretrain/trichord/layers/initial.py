"""Initial values of parameters while a model is built: kept in part on each rank, or not computed at all.

Both act on whatever code builds the model, ours, timm's or transformers', and change no number: with `OwnSlices` every
rank still draws every random number of every parameter in the same order from the same generator, only it keeps a
slice of each.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a parameter held before does not matter to these, where they cover it whole.
_OVERWRITING = {"aten::normal_", "aten::uniform_", "aten::fill_", "aten::zero_", "aten::copy_"}
# The same tensor under another name, which may stay empty; other views are refused by torch without storage.
_WITHOUT_VALUES = {"aten::detach", "aten::alias"}
_OPEN_BYTES = 64 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_skipping = 0


def skips_initial_values() -> bool:
    """Whether a model built now has all its weights overwritten afterwards, so that none need be read from disk."""
    return _skipping > 0


@contextmanager
def return_large_blocks() -> Iterator[None]:
    """While active, blocks of 1 MiB and more are mappings of their own, which go back to the system when freed.

    glibc raises that limit to 32 MiB as soon as such a block is freed, and takes aligned blocks from the heap only
    where there is room for the alignment too: a block that has just been freed is not used again, and 100 blocks of
    16 MiB, one at a time, take 1.5 GiB. On the way out the limits are those that it would have raised them to.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


class _ParameterMode(TorchDispatchMode):
    """A mode that knows the floating-point parameters on the CPU which are registered while it is active."""

    def __enter__(self) -> Any:
        self._registration = register_module_parameter_registration_hook(self._on_registration)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._registration.remove()
        super().__exit__(*exc)

    def _on_registration(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type == "cpu" and parameter.is_floating_point():
            self._add(parameter)

    def _add(self, parameter: nn.Parameter) -> None:
        raise NotImplementedError  # pragma: no cover  (each subclass has its own)


class SkipInitialValues(_ParameterMode):
    """While active, parameters are allocated and nothing is written into them: their values come from elsewhere."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self) -> Any:
        global _skipping
        _skipping += 1
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        global _skipping
        _skipping -= 1
        super().__exit__(*exc)

    def _add(self, parameter: nn.Parameter) -> None:
        storage = parameter.untyped_storage()
        self._storages[storage._cdata] = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        target = args[0] if func._schema.is_mutable and args else None
        on_cpu = isinstance(target, Tensor) and target.device.type == "cpu"
        if on_cpu and target.untyped_storage()._cdata in self._storages:
            return target
        return func(*args, **(kwargs or {}))


@dataclass
class _Kept:
    """What is kept of one parameter. own: this rank's slice while the storage is empty; None: nothing was written."""

    storage: torch.UntypedStorage
    dtype: torch.dtype
    numel: int
    own: Tensor | None = None

    @property
    def is_open(self) -> bool:
        return self.storage.nbytes() > 0

    @property
    def is_used(self) -> bool:
        """Whether a tensor shares this storage, or only we and Python hold it."""
        return torch._C._storage_Use_Count(self.storage._cdata) > 1

    def whole(self) -> Tensor:
        """(numel,) over the open storage."""
        return torch.empty(0, dtype=self.dtype).set_(self.storage, 0, (self.numel,), (1,))


class OwnSlices(_ParameterMode):
    """While active, a parameter is whole only while something is done with it; then this rank's slice is all that
    stays, so that the peak is the model over the number of ranks and a few parameters, never the model.

    Parameters keep their shape; their storage is empty until it is needed. An operation that reads a parameter which
    has been put away makes it whole again from all ranks' slices: every rank must build the same model by the same
    code. Until `DeepSpeed` has taken them over (`take`), nothing may compute with them outside of this mode.

    Slices are ceil(numel / ranks) long in rank order, as those of ZeRO-3.
    """

    def __init__(self, rank: int, world_size: int, open_bytes: int = _OPEN_BYTES):
        super().__init__()
        self.rank, self.world_size, self.open_bytes = rank, world_size, open_bytes
        self._kept: dict[int, _Kept] = {}
        self._open: OrderedDict[int, _Kept] = OrderedDict()  # least recently used first
        self._resting = False

    def __enter__(self) -> Any:
        self._returning = return_large_blocks()
        self._returning.__enter__()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._kept = {key: kept for key, kept in self._kept.items() if kept.is_used}  # not those replaced since
        self._put_away(0)
        self._returning.__exit__(None, None, None)

    def holds(self, parameter: Tensor) -> bool:
        return parameter.device.type == "cpu" and parameter.untyped_storage()._cdata in self._kept

    def take(self, parameter: Tensor) -> Tensor | None:
        """This rank's slice, at most ceil(numel / ranks) elements and none on ranks past the end; None where nothing
        was written. The parameter is forgotten."""
        return self._kept.pop(parameter.untyped_storage()._cdata).own

    def share(self, numel: int) -> tuple[int, int]:
        """Start and end of this rank's slice of `numel` elements."""
        length = -(-numel // self.world_size)
        return min(numel, self.rank * length), min(numel, (self.rank + 1) * length)

    def _add(self, parameter: nn.Parameter) -> None:
        if self.holds(parameter):  # tied, or moved to another module
            return
        with self._rest():
            if not _owns_its_storage(parameter):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            storage = parameter.untyped_storage()
            key = storage._cdata
            self._kept[key] = self._open[key] = _Kept(storage, parameter.dtype, parameter.numel())
            self._put_away(self.open_bytes, spare={key})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if not self._resting and func._schema.name not in _WITHOUT_VALUES:
            used = self._used(args, kwargs)
            for key in used:
                self._make_whole(key, keep=not self._overwrites(func, args, key))
            self._put_away(self.open_bytes, spare=used)
        return func(*args, **(kwargs or {}))

    def _used(self, args: Any, kwargs: Any) -> set[int]:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        keys = {tensor.untyped_storage()._cdata for tensor in tensors if tensor.device.type == "cpu"}
        return keys & self._kept.keys()

    def _overwrites(self, func: Any, args: tuple, key: int) -> bool:
        """Whether the operation writes every element of the parameter without having read it."""
        target = args[0]
        if func._schema.name not in _OVERWRITING or target.untyped_storage()._cdata != key:
            return False
        others = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor)]
        return target.numel() == self._kept[key].numel and all(o.untyped_storage()._cdata != key for o in others)

    def _make_whole(self, key: int, keep: bool) -> None:
        kept = self._kept[key]
        self._open[key] = kept
        self._open.move_to_end(key)
        if kept.is_open:
            return
        kept.storage.resize_(kept.numel * kept.dtype.itemsize)
        if keep and kept.own is not None:
            self._gather(kept)
        kept.own = None

    def _gather(self, kept: _Kept) -> None:
        assert kept.own is not None
        length = -(-kept.numel // self.world_size)
        own = torch.zeros(length, dtype=kept.dtype)
        own[: kept.own.numel()] = kept.own
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        kept.whole().copy_(torch.cat(parts)[: kept.numel])

    def _put_away(self, most: int, spare: Collection[int] = ()) -> None:
        """Reduce the open parameters to `most` bytes, the least recently used first."""
        total = sum(kept.storage.nbytes() for kept in self._open.values())
        for key in [key for key in self._open if key not in spare]:
            if total <= most:
                return
            kept = self._open.pop(key)
            total -= kept.storage.nbytes()
            if kept.is_used:
                start, end = self.share(kept.numel)
                kept.own = kept.whole()[start:end].clone()
            kept.storage.resize_(0)

    @contextmanager
    def _rest(self) -> Iterator[None]:
        """Our own work on parameters is none of the model's."""
        before, self._resting = self._resting, True
        try:
            yield
        finally:
            self._resting = before


def _owns_its_storage(parameter: Tensor) -> bool:
    storage = parameter.untyped_storage()
    fits = storage.nbytes() == parameter.numel() * parameter.element_size() and parameter.is_contiguous()
    return fits and storage.resizable()
