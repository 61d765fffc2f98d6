"""torch.compile block by block: one small graph for all blocks of a stack, where the whole model would be one graph
per shape, minutes to compile, and broken wherever the model reads the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from trichord.core.errors import ConfigError
from trichord.core.log import FILE_ONLY, get_logger
from trichord.core.phase import phase
from trichord.layers.recompute import Recompute, checkpointed, chosen_blocks

log = get_logger(__name__)

BACKEND = "inductor"
# What torch compiles anew for a block: training, features without gradients, evaluation; one item or several, of one
# token or several, with a mask or without; a tensor or a view of one.
_GRAPHS_OF_LIKE_BLOCKS = 64
_GRAPHS_PER_BLOCK = 8  # where blocks differ, as stages of a convolutional network do
_WAY_OUT = "or set engine.compile=false, which may change on resume"


def require_compiler(device: torch.device) -> None:
    """Compile something small, so that a machine that cannot says so before anything large is built.

    Raises:
        ConfigError: no C++ compiler, no headers of Python, or nowhere to put what is built.
    """
    try:
        if BACKEND == "inductor":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()  # by itself: what is compiled below may lie in torch's cache
        torch.compile(_probe, backend=BACKEND)(torch.ones(8, device=device))
    except (RuntimeError, OSError) as error:
        raise ConfigError(
            f"engine.compile: torch.compile cannot build code on this machine ({_reason(error)}); install a C++ "
            f"compiler (g++, or the one that CXX names) and the headers of Python, {_WAY_OUT}"
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x.sin() + 1


def compile_blocks(blocks: Sequence[nn.Module], recompute: Recompute = "none", every: int = 1) -> None:
    """Compile the forward of each block, for any number and length of items, as it is recomputed.

    The forward, not the call: hooks stay outside, among them those by which ZeRO-3 gathers a block's parameters; and
    the modules stay themselves, so that nothing is called `_orig_mod` in a checkpoint.
    """
    again = {id(block) for block in chosen_blocks(blocks, every)} if recompute != "none" else set()
    _allow_graphs(max(_GRAPHS_OF_LIKE_BLOCKS, _GRAPHS_PER_BLOCK * len(blocks)))
    _tell_compilations()
    for block in blocks:
        mode = recompute if id(block) in again else "none"
        block.forward = _telling_errors(_compiled(block.forward, mode), type(block).__name__)


def _compiled(forward: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """Full recomputation stays outside of the graph: inside, inductor cannot split the masked attention of an audio
    tower into forward and backward. Selective goes by the operations in the graph."""
    inside = checkpointed(forward, mode) if mode == "selective" else forward
    run = torch.compile(inside, backend=BACKEND, dynamic=True)
    return checkpointed(run, mode) if mode == "full" else run


def _allow_graphs(count: int) -> None:
    """Blocks share their code, and so its number of graphs; beyond it torch warns, and runs what is new uncompiled."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, count)


def _telling_errors(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, whose compiler's errors are one line."""
    from torch._dynamo.exc import TorchDynamoException

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TorchDynamoException as error:
            raise ConfigError(
                f"engine.compile: torch.compile failed on a {name} ({_reason(error)}); see the log for what it "
                f"tried, {_WAY_OUT}"
            ) from error

    return run


def _reason(error: BaseException) -> str:
    """The line of a compiler's output that says what is wrong, or else the first one."""
    lines = [line for line in str(error).strip().splitlines() if not line.endswith("raised:")] or [type(error).__name__]
    return next((line.strip() for line in lines if "error: " in line), lines[0])


@cache
def _tell_compilations() -> None:
    """Have a rank that compiles say so, with each new graph: it moves, for whoever judges a step that does not end."""
    from torch._dynamo.callback import callback_handler

    telling = _Telling()
    callback_handler.register_start_callback(telling.begin)
    callback_handler.register_end_callback(telling.end)


class _Telling:
    """One compilation at a time, forward or backward: torch counts what is nested as one."""

    def __init__(self) -> None:
        self._count = 0
        self._phase: phase | None = None
        self._since = 0.0

    def begin(self, _: Any) -> None:
        threading.current_thread()  # known by name from now on: on a GPU it is a thread of autograd's that compiles
        self._count += 1
        self._since = time.monotonic()
        self._phase = phase("compile", graph=self._count)
        self._phase.__enter__()

    def end(self, _: Any) -> None:
        if self._phase is not None:
            self._phase.__exit__(None)
        log.info("engine.compile: graph %d in %.1f s", self._count, time.monotonic() - self._since, extra=FILE_ONLY)
