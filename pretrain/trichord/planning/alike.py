"""Blocks of a stack that are alike are run once: what the others keep, move and send is the same.

A trunk has dozens of equal layers, and a pass over shapes takes as long for each of them. Two blocks are alike where
they have the same classes, options and shapes of parameters, all the way down, and are both recomputed or both not. The
first blocks of a stack always run, of each sort one: they also make what all of them share, such as positions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trichord.layers.blocks import block_lists

_PLAIN = (bool, int, float, str, tuple, type(None))
_NUMBERED = ("layer_idx", "layer_index", "layer_id")  # which layer it is, not what it does


@dataclass
class Trace:
    """saved: room -> bytes that the backward pass needs; blocks: block (a layer of a tower or the trunk) -> its part of
    them; moved: room -> bytes read and written by everything but products and attention; launches: ops executed. Where
    ranks share rows, sent: kind of exchange -> bytes that a rank puts in; messages: of each kind."""

    saved: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    launches: int = 0

    @property
    def total(self) -> int:
        return sum(self.saved.values())

    def add(self, other: Trace) -> None:
        for name in ("saved", "blocks", "moved", "sent", "messages"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + value
        self.launches += other.launches

    def copy(self) -> Trace:
        other = Trace()
        other.add(self)
        return other

    def since(self, before: Trace) -> Trace:
        """What has come since a copy was made."""
        names = ("saved", "blocks", "moved", "sent", "messages")
        parts = ({k: v - getattr(before, n).get(k, 0) for k, v in getattr(self, n).items()} for n in names)
        return Trace(*parts, launches=self.launches - before.launches)


@contextmanager
def one_of_alike(model: nn.Module, trace: Trace, every: int) -> Iterator[None]:
    """While it lasts, blocks that are like one before them add to `trace` what that one did, and hand on their input.

    every: the first of so many blocks is recomputed.
    """
    names = {id(module): name for name, module in model.named_modules()}
    before = [(block, block.__class__) for blocks in block_lists(model) for block in blocks]
    for blocks in block_lists(model):
        kinds: dict[Hashable, _Kind] = {}
        for number, block in enumerate(blocks[every:], start=every):
            kind = kinds.setdefault((_likeness(block), number % every), _Kind())
            block.__class__ = _standing_in(type(block), kind, trace, names[id(block)])
    try:
        yield
    finally:
        for block, old in before:
            block.__class__ = old


@dataclass
class _Kind:
    """The first block of a kind. given: the facts of its input; part: what it did to the trace, None before it ran, or
    where its output is not like its input; result: input of another one -> its output."""

    given: Hashable = None
    part: Trace | None = None
    result: Callable[[Tensor], Any] = lambda given: given


def _standing_in(old: type, kind: _Kind, trace: Trace, name: str) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given: Any = args[0] if args else kwargs.get("hidden_states")
        if kind.part is not None and _facts(given) == kind.given:
            trace.add(kind.part)
            if size := trace.blocks.pop("", 0):
                trace.blocks[name] = size
            return kind.result(given)
        before = trace.copy()
        output = old.__call__(self, *args, **kwargs)
        first, *rest = output if isinstance(output, tuple) else (output,)
        if kind.part is None and given is not None and _facts(first) == _facts(given):
            kind.given, kind.part = _facts(given), trace.since(before)
            kind.part.blocks = {"": sum(kind.part.blocks.values())}
            kind.result = (lambda own: (own, *rest)) if isinstance(output, tuple) else (lambda own: own)
        return output

    return type(old.__name__, (old,), {"__module__": old.__module__, "__call__": call})


def _facts(value: Any) -> Hashable:
    return (tuple(value.shape), value.dtype, value.requires_grad) if isinstance(value, Tensor) else id(value)


def _likeness(block: nn.Module) -> Hashable:
    """Equal for blocks that are alike."""
    return tuple(
        (name, type(module), tuple(sorted(_options(module))), tuple(_shapes(module)))
        for name, module in block.named_modules()
    )


def _options(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if isinstance(value, _PLAIN) and name not in _NUMBERED:
            yield name, repr(value)


def _shapes(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    for name, parameter in module.named_parameters(recurse=False):
        yield name, tuple(parameter.shape), parameter.requires_grad
