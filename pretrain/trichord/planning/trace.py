"""One forward pass of the model over shapes alone: what autograd keeps of it, and what it reads and writes.

The model is built on the meta device; its parameters and the media of a batch become fake tensors, which have a size
and no memory, while indices and boundaries stay real, so that code which reads them on the host runs as in training.
What is recorded is therefore the code's own doing, whatever the tower:

    reference   the plain-torch twins of our kernels, which run on a CPU; checked there against real runs
    triton      our registered ops, which run on a GPU: autograd saves what their `register_autograd` says (the
                tables of docs/kernels). No GPU has checked it

Tensors that share memory count once; parameters do not count.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trichord.batches.packed_batch import PackedBatch
from trichord.fusion.model import Trichord
from trichord.layers.blocks import block_lists
from trichord.layers.recompute import KEPT_OPS, Recompute
from trichord.layers.selection import ENVIRONMENT
from trichord.planning.alike import Trace, one_of_alike
from trichord.planning.sharing import ShapeGroup
from trichord_kernels.dispatch import HAS_TRITON

Rule = Literal["reference", "triton"]
_MEDIA = ("pixels", "waveforms", "log_mels")
_TRAFFIC_OF = ("aten", "trichord")  # namespaces of ops that run on the device
# Products count by their FLOPs, not by what they move; an empty tensor is not written; some views do not say so.
_NOT_TRAFFIC = (
    "_unsafe_view",
    "linear_cross_entropy_forward",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
)
_GATHERS = ("embedding", "index", "index_select", "gather")  # read as much as they write, whatever they read from
_ATTENTION = ("scaled_dot_product", "attention")


class ShapeModel:
    """A model of shapes. `half`: parameters in bfloat16, as ZeRO keeps them under precision bf16 (fp16 alike)."""

    def __init__(self, model: Trichord, *, half: bool = False):
        """model: on the meta device; it is taken over."""
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = (model.to(torch.bfloat16) if half else model).train()
        with _parameters_replaced():
            self.model._apply(self._fake)

    def trace(
        self,
        batch: PackedBatch,
        rule: Rule,
        *,
        autocast: bool = False,
        recompute: Recompute = "none",
        every: int = 1,
        shared: int = 1,
    ) -> Trace:
        """Record one forward pass over a CPU batch.

        recompute, every: as `engine.activation_checkpointing` and `engine.checkpoint_every_blocks`; shared: ranks that
        share the batch; it is the pass of the one with the most of it.

        Raises:
            ValueError: rule `triton` where triton is not installed.
        """
        if rule == "triton" and not HAS_TRITON:
            raise ValueError("rule triton: the ops are registered only where triton is installed")
        batch = batch.shared(shared - 1, shared)
        batch = replace(batch, **{name: self._fake(getattr(batch, name)) for name in _MEDIA})
        with ExitStack() as stack:
            stack.enter_context(_recomputed(self.model, recompute, every))
            recorder = _Recorder(self.model, keeps_products=recompute == "selective")
            self.model.sequence = ShapeGroup(shared, recorder.sent) if shared > 1 else None
            stack.enter_context(one_of_alike(self.model, recorder.trace, every if recompute != "none" else 1))
            stack.enter_context(_kernels(rule))
            stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=autocast))
            stack.enter_context(recorder.hooks())
            stack.enter_context(warnings.catch_warnings())
            # That selective recomputation keeps its tensors out of sight of these hooks is known here.
            warnings.filterwarnings("ignore", message="A saved_tensors_hooks context", category=FutureWarning)
            self.model(batch)
        return recorder.trace

    def _fake(self, tensor: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_like(tensor, device="cpu")


class _Recorder:
    """Collects while the model runs; knows by forward hooks which module is running. keeps_products: inside of blocks,
    results of products are kept by the recomputation itself, which no hook of autograd sees."""

    def __init__(self, model: nn.Module, keeps_products: bool):
        self.model = model
        blocks = {id(block) for blocks in block_lists(model) for block in blocks}
        self.blocks = {name for name, module in model.named_modules() if id(module) in blocks}
        self.keeps_products = keeps_products
        self.trace = Trace()
        self._known: dict[int, Tensor] = {
            _key(p): p for p in model.parameters()
        }  # tensors are kept: an address is reused otherwise
        self._running: list[str] = []

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            handles.append(module.register_forward_hook(lambda *_: self._running.pop() and None, always_call=True))
        saved = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        try:
            with saved, _Traffic(self._ran):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _save(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._known[_key(tensor)] = tensor
            size = tensor.untyped_storage().nbytes()
            self.trace.saved[self._room] = self.trace.saved.get(self._room, 0) + size
            if (block := self._block) is not None:
                self.trace.blocks[block] = self.trace.blocks.get(block, 0) + size
        return tensor

    def _ran(self, name: str, moved: int, out: Any) -> None:
        self.trace.launches += 1
        self.trace.moved[self._room] = self.trace.moved.get(self._room, 0) + moved
        if self.keeps_products and name in KEPT_OPS and self._block is not None:
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self._save(tensor)

    def sent(self, size: float) -> None:
        """An exchange with the ranks that share the batch."""
        kind = "features" if self._block is None else "attention"
        self.trace.sent[kind] = self.trace.sent.get(kind, 0) + round(size)
        self.trace.messages[kind] = self.trace.messages.get(kind, 0) + 1

    @property
    def _block(self) -> str | None:
        return next((name for name in reversed(self._running) if name in self.blocks), None)

    @property
    def _room(self) -> str:
        """Room of the running module: a tower, `connector`, `trunk`, `heads`, `loss` (the trunk's head), or `stream`
        (what belongs to none: embedding merge, pooling)."""
        name = next((running for running in reversed(self._running) if running), "")
        if name.startswith("trunk.lm_head"):
            return "loss"
        first = name.split(".", 1)[0]
        return {"connectors": "connector", "logit_scale": "heads", "": "stream"}.get(first, first)


class _Traffic(TorchDispatchMode):
    """Calls `note` for each op that is no view: its name, the bytes that it reads and writes (0 for products), its
    result."""

    def __init__(self, note: Any):
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        name = func._schema.name.split("::")[-1]
        if is_view or func.namespace not in _TRAFFIC_OF:
            return out
        product = name in _NOT_TRAFFIC or any(part in name for part in _ATTENTION)
        read = _bytes(out) if name in _GATHERS else _bytes(args) + _bytes(kwargs)
        self._note(func._schema.name, 0 if product else read + _bytes(out), out)
        return out


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple, type({}.values()))) else 0


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _recomputed(model: Trichord, recompute: Recompute, every: int) -> Iterator[None]:
    blocks = [(block, block.__class__) for blocks in block_lists(model) for block in blocks]
    model.enable_activation_checkpointing(recompute, every)
    try:
        yield
    finally:
        for block, old in blocks:
            block.__class__ = old


@contextmanager
def _kernels(rule: Rule) -> Iterator[None]:
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = rule
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before


@contextmanager
def _parameters_replaced() -> Iterator[None]:
    """`Module._apply` puts new Parameters in the place of the old ones: their kind of tensor changes."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
