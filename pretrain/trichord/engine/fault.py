"""What ended a run: one record that goes from the rank that noticed to all others, and into the run folder."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trichord.batches.workers import death_of_worker
from trichord.core.errors import EXIT_UNEXPECTED, TrichordError
from trichord.core.phase import current_phase, notes
from trichord.engine.config import EngineConfig

# What gloo, NCCL and the store say when the other side is gone. They raise plain RuntimeErrors for it.
_BROKEN = re.compile(
    r"gloo|NCCL|ProcessGroup|Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket Timeout|"
    r"(send|recv)Bytes",
    re.IGNORECASE,
)
_NO_HOST_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory|not enough memory")
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the largest size of a file is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written",
    errno.EIO: "the disk fails",
}


@dataclass(frozen=True)
class Fault:
    """kind: lost (a rank is gone), stuck, error (an exception of `rank`). code: what processes leave with. table:
    phases of all ranks, where they are known. stuck: the ranks whose stacks say why."""

    kind: str
    reason: str
    code: int = EXIT_UNEXPECTED
    rank: int | None = None
    stuck: tuple[int, ...] = ()
    table: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Fault:
        values = json.loads(text)
        return cls(**{**values, "stuck": tuple(values["stuck"]), "table": tuple(values["table"])})


class FaultError(TrichordError):
    """A fault as the exception that this process ends with."""

    def __init__(self, reason: str, code: int = EXIT_UNEXPECTED):
        super().__init__(reason)
        self.exit_code = code


def is_broken_collective(error: BaseException) -> bool:
    """Whether another rank may be the cause."""
    broken = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    return broken and _BROKEN.search(str(error)) is not None and _NO_HOST_MEMORY.search(str(error)) is None


def readable(error: BaseException, engine: EngineConfig, micro_rows: int) -> BaseException:
    """The same as a `TrichordError` with one message, where a user can act on it; else the error itself."""
    if isinstance(error, TrichordError):
        return error
    if (death := death_of_worker(error)) is not None:
        return death
    if isinstance(error, torch.OutOfMemoryError):
        return FaultError(_out_of_memory("the device", str(error), engine, micro_rows))
    host = isinstance(error, RuntimeError) and _NO_HOST_MEMORY.search(str(error)) is not None
    if isinstance(error, MemoryError) or host:
        return FaultError(_out_of_memory("the host", str(error) or "MemoryError", engine, micro_rows))
    if isinstance(error, OSError) and error.errno in _DISK:
        file = f" {error.filename}" if error.filename else ""
        return FaultError(
            f"{_DISK[error.errno]} ({current_phase() or 'start'}): cannot write{file}: {error.strerror}; free space or "
            "rights there, then run the same command to go on from the last checkpoint"
        )
    return error


def _out_of_memory(where: str, said: str, engine: EngineConfig, micro_rows: int) -> str:
    main = current_phase()
    what = f"out of memory on {where} in {main or 'start'}{_shape(main.facts.get('micro_step') if main else None)}"
    stage = "" if engine.zero_stage == 3 else f"raise engine.zero_stage (now {engine.zero_stage}), "
    return (
        f"{what}: lower batches.micro_rows (now {micro_rows}), set engine.activation_checkpointing (now "
        f"{_shown(engine.activation_checkpointing)}), {stage}or set engine.offload (now {engine.offload}). Said: "
        f"{said.splitlines()[0][:300]}"
    )


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value))


def _shape(micro_step: Any) -> str:
    """The micro-batch at hand, or the largest of the step."""
    batches = notes().get("micro_batches") or []
    if not batches:
        return ""
    if not isinstance(micro_step, int) or micro_step >= len(batches):
        micro_step = max(range(len(batches)), key=lambda number: tuple(batches[number].values()))
    batch = batches[micro_step]
    return (
        f", on a micro-batch of {batch['tokens']} tokens ({batch['useful']} in use), {batch['images']} images and "
        f"{batch['clips']} clips"
    )
