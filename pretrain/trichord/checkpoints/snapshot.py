"""A copy of this rank's state in host memory, made while training goes on and finished before the next update.

The copy is the very bytes of the rank's safetensors file, in one block of memory that is allocated once and reused: it
is written in large pieces, however many slices there are.
"""

from __future__ import annotations

import json
import mmap
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trichord.checkpoints.slices import slice_key
from trichord.checkpoints.state import OwnedSlice
from trichord.core.log import get_logger

log = get_logger(__name__)

_ALIGNMENT = 64  # of the first tensor, for whole cache lines


@dataclass(frozen=True)
class Layout:
    """Where each slice lies in the file. head: its first bytes; spans: "name:kind" -> (first byte, elements)."""

    head: bytes
    spans: dict[str, tuple[int, int]]
    size: int


def lay_out(sizes: dict[str, int]) -> Layout:
    """The safetensors file of flat fp32 tensors of so many elements, in the order given."""
    header: dict[str, Any] = {}
    offset = 0
    for key, numel in sizes.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # the format allows blanks there
    head = len(text).to_bytes(8, "little") + text
    spans = {key: (len(head) + facts["data_offsets"][0], sizes[key]) for key, facts in header.items()}
    return Layout(head, spans, len(head) + offset)


class HostImage:
    """The memory that snapshots are copied to. It holds one at a time."""

    def __init__(self):
        self._layout: Layout | None = None
        self._sizes: dict[str, int] = {}
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._views: dict[str, Tensor] = {}
        self._side_stream: Any = None

    def take(self, pieces: Sequence[OwnedSlice], at_once: frozenset[str] = frozenset()) -> Snapshot:
        """Begin to copy the slices. Until `Snapshot.wait_copied` has returned, none of them may change.

        at_once: names of those that are copied before this returns.
        """
        live = {slice_key(piece.name, kind): tensor for piece in pieces for kind, tensor in piece.tensors.items()}
        sizes = {key: tensor.numel() for key, tensor in live.items()}
        if self._layout is None or list(sizes.items()) != list(self._sizes.items()):
            self._allocate(sizes, on_gpu=any(tensor.is_cuda for tensor in live.values()))
        now = {slice_key(piece.name, kind) for piece in pieces if piece.name in at_once for kind in piece.tensors}
        for key in now:
            self._views[key].copy_(live[key].detach())
        later = [(self._views[key], tensor) for key, tensor in live.items() if key not in now]
        snapshot = Snapshot(self.bytes, self._index(pieces))
        if any(tensor.is_cuda for _, tensor in later):
            self._copy_beside(snapshot, later)
        else:
            snapshot.pending = later
        return snapshot

    @property
    def bytes(self) -> memoryview:
        return self._bytes.numpy().data

    def _copy_beside(self, snapshot: Snapshot, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """From a GPU: copies on a stream of their own, which the host does not wait for."""
        self._side_stream = self._side_stream or torch.cuda.Stream()
        self._side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side_stream):
            for view, tensor in pairs:
                view.copy_(tensor.detach(), non_blocking=True)
                if tensor.is_cuda:
                    tensor.record_stream(self._side_stream)
        snapshot.gpu_done = self._side_stream.record_event()

    def _allocate(self, sizes: dict[str, int], on_gpu: bool) -> None:
        self._views.clear()
        self._layout, self._sizes = lay_out(sizes), sizes
        self._bytes = _host_memory(self._layout.size, on_gpu)
        self._bytes[: len(self._layout.head)] = torch.frombuffer(bytearray(self._layout.head), dtype=torch.uint8)
        for key, (first, numel) in self._layout.spans.items():
            self._views[key] = self._bytes[first : first + 4 * numel].view(torch.float32)

    @staticmethod
    def _index(pieces: Sequence[OwnedSlice]) -> dict[str, Any]:
        """This rank's part of index.json."""
        index: dict[str, Any] = {"params": {}, "slices": {}}
        for piece in pieces:
            index["params"][piece.name] = {"shape": list(piece.shape), "group": piece.group}
            for kind in piece.tensors:
                index["slices"].setdefault(piece.name, {})[kind] = [piece.start, piece.numel]
        return index


@dataclass
class Snapshot:
    """image: the bytes of the rank's file, whole once `copy` has returned; index: which slices it holds.

    pending: (copy, live tensor) pairs that `copy` has to copy; gpu_done: recorded behind the copies from a GPU.
    """

    image: memoryview
    index: dict[str, Any]
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    gpu_done: Any = None
    _copied: threading.Event = field(default_factory=threading.Event)

    def copy(self) -> None:
        """In the writer's thread: finish the copy. A failure must not leave the training thread waiting."""
        try:
            for view, tensor in self.pending:  # the copy itself runs without the interpreter's lock
                view.copy_(tensor.detach())
            if self.gpu_done is not None:
                self.gpu_done.synchronize()
        finally:
            self.pending = []
            self._copied.set()

    def wait_copied(self) -> None:
        """In the training thread, before the state changes. On a GPU the device waits, and the host does not."""
        if self.gpu_done is not None:
            torch.cuda.current_stream().wait_event(self.gpu_done)
        else:
            self._copied.wait()


def _host_memory(size: int, on_gpu: bool) -> Tensor:
    """(size,) uint8 in large pages, not copied into forked processes (data workers must not hold a second state), and
    pinned where the state is on a GPU."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            try:
                memory.madvise(getattr(mmap, advice))
            except OSError as error:  # a kernel without it
                log.debug("%s: %s", advice, error)
    block = torch.frombuffer(memory, dtype=torch.uint8)[:size]
    if on_gpu:
        status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0)
        if int(status) != 0:
            log.warning("the buffers of checkpoints (%.1f GiB) are not pinned: error %s", size / 2**30, status)
    return block
