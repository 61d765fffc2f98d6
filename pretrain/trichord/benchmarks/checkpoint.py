"""`trichord bench checkpoint`: what saving costs a training loop, and how fast it writes, against stated baselines.

A model whose state has the size asked for trains in this process, one rank. Rounds alternate the loop without a save,
the loop with one, a blocking save of the same bytes and a plain write of them; figures are medians over rounds.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trichord.batches.loader_state import LaneCursor, LoaderState
from trichord.benchmarks.checkpoint_loop import TrainingLoop
from trichord.benchmarks.data import Target
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.hashes import new_digest
from trichord.checkpoints.save import CheckpointSaver
from trichord.checkpoints.write import BLOCK_BYTES, write_hashed
from trichord.core.errors import ConfigError
from trichord.shards.lanes import LanePlanner, LaneSource

MAX_STALL = 0.25
MIN_RATE = 0.70
_STEPS_AFTER = 1  # steps that a round goes on for once its save is committed
_FREE_FILES = 6  # of the state's size, that the disk must have room for


@dataclass
class _Taken:
    """Seconds, one entry per round."""

    step: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    in_calls: list[float] = field(default_factory=list)
    save: list[float] = field(default_factory=list)
    blocking: list[float] = field(default_factory=list)
    hashed: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)


def bench_checkpoint(
    folder: Path, state_gb: float = 1.0, rounds: int = 7, on_progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Everything that was measured, as JSON types: `state`, `rows`, `targets`, `first_save_s`.

    Args:
        folder: on the disk that is meant; everything written there is removed again. state_gb: 1e9 bytes of fp32
        weights and Adam's moments.

    Raises:
        ConfigError: the disk has no room.
    """
    _require_room(folder, state_gb)
    loop = TrainingLoop(state_gb)
    saver = CheckpointSaver(folder / "checkpoints", CheckpointsConfig(keep_last=1), "bench")
    on_progress(f"{loop.parameters:,} parameters; warming up")
    loop.run(2)
    first_s, _, steps = _with_save(loop, saver)
    _with_save(loop, saver)
    taken = _Taken()
    for number in range(rounds):
        on_progress(f"round {number + 1} of {rounds}")
        before = loop.run(steps) / steps
        seconds, saving, count = _with_save(loop, saver)
        after = loop.run(steps) / steps
        taken.step.append((before + after) / 2)
        taken.stall.append(seconds - count * (before + after) / 2)
        taken.in_calls.append(saving.in_calls_s)
        taken.save.append(saving.save_s)
        _write_once(folder, saver.image_bytes, taken, turned=number % 2 == 1)
    saver.finish()
    shutil.rmtree(folder / "checkpoints")
    return _result(loop, taken, rounds, len(saver.image_bytes), first_s - steps * statistics.median(taken.step))


@dataclass(frozen=True)
class _Saving:
    in_calls_s: float
    save_s: float


def _with_save(loop: TrainingLoop, saver: CheckpointSaver) -> tuple[float, _Saving, int]:
    """Seconds of the training thread from before `begin` until the step after the commit, and how many steps those are.

    Nothing else waits: the optimizer's hook and `poll` are part of the steps.
    """
    began = time.perf_counter()
    saver.begin(loop.engine, loop.step, {"progress": {}}, _loader_state(loop.step))
    in_calls = time.perf_counter() - began
    steps, committed_s = 0, math.nan
    extra = _STEPS_AFTER
    while extra:
        loop.run(1)
        steps += 1
        polled = time.perf_counter()
        if saver.poll() is not None:
            committed_s = polled - began
        in_calls += time.perf_counter() - polled
        extra -= not math.isnan(committed_s)
    return time.perf_counter() - began, _Saving(in_calls, committed_s), steps


def _write_once(folder: Path, image: memoryview, taken: _Taken, turned: bool) -> None:
    """The three writes of a round, in turned order every other time."""
    writes = [(_blocking, taken.blocking), (write_hashed, taken.hashed), (_plain, taken.plain)]
    for write, seconds in reversed(writes) if turned else writes:
        path = folder / "written.bin"
        began = time.perf_counter()
        write(path, image)
        seconds.append(time.perf_counter() - began)
        path.unlink()


def _blocking(path: Path, data: memoryview) -> None:
    """What a save costs that does it all in the training thread: write and hash block by block, then fsync."""
    digest = new_digest()
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            digest.update(block)
            _write_all(file, block)
        os.fsync(file.fileno())
    digest.hexdigest()


def _plain(path: Path, data: memoryview) -> None:
    """The disk's own pace: sequential writes and one fsync, nothing hashed."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), BLOCK_BYTES):
            _write_all(file, data[start : start + BLOCK_BYTES])
        os.fsync(file.fileno())


def _write_all(file: Any, block: memoryview) -> None:
    while len(block):
        block = block[file.write(block) :]


def _result(loop: TrainingLoop, taken: _Taken, rounds: int, size: int, first_s: float) -> dict[str, Any]:
    median = {name: statistics.median(values) for name, values in asdict(taken).items()}
    rows = [
        _row("step of the loop", taken.step),
        _row("save in the background, begin to commit", taken.save, size),
        _row("stall: extra time of the training thread", taken.stall),
        _row("... of it inside the saver's calls", taken.in_calls),
        _row("blocking: write, hash, fsync", taken.blocking, size),
        _row("written and hashed beside it", taken.hashed, size),
        _row("plain write and fsync", taken.plain, size),
    ]
    targets = [
        Target("stall over a blocking save", median["stall"] / median["blocking"], MAX_STALL, at_most=True),
        Target("write rate, hashes included, over a plain write", median["plain"] / median["hashed"], MIN_RATE),
    ]
    state = {"bytes": size, "parameters": loop.parameters, "threads": torch.get_num_threads(), "zero_stage": 1}
    return {
        "state": state,
        "rounds": rounds,
        "rows": rows,
        "targets": [asdict(target) | {"met": target.met} for target in targets],
        "first_save_s": first_s,
        "seconds": asdict(taken),
    }


def _row(what: str, seconds: list[float], size: int | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"what": what, "s": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}
    return row | ({"GB/s": size / row["s"] / 1e9} if size else {})


def _loader_state(step: int) -> LoaderState:
    planner = LanePlanner(0, [LaneSource([100])], num_lanes=1, window_samples=8)
    return LoaderState(step, {0: LaneCursor(planner.first_state(0))}, {"num_lanes": 1})


def _require_room(folder: Path, state_gb: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stats = os.statvfs(folder)
    free, needed = stats.f_bavail * stats.f_frsize, _FREE_FILES * state_gb * 1e9
    if free < needed:
        raise ConfigError(
            f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; name a --folder on another "
            "disk, or a smaller --state-gb"
        )
