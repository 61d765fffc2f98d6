"""`trichord selftest resume` and `chaos`: a user's own config, killed and resumed, against the same run undisturbed.

    undisturbed      N steps on split A
    killed, same     kill -9, then on with split A          equal bit for bit: losses, weights, optimizer states
    killed, other    kill -9, then on with another split    the same samples; losses to rounding

A split is world size, ZeRO stage, data workers (and threads), and how many ranks share a row: another one adds up
gradients in another order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trichord.checkpoints.load import find_latest, resolve_checkpoint
from trichord.checkpoints.manifest import MANIFEST_FILE, read_json
from trichord.checkpoints.slices import SliceReader
from trichord.config.load import load_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.replay import LOW_PRECISION_TOLERANCE, TOLERANCE
from trichord.selftest.processes import Moment, train_and_kill, train_and_kill_at, train_by_launcher
from trichord.tracking.metrics import merge_steps, read_metrics

COMPARED_STEPS = 20
FINAL_SHARE = 0.1
_COMPARED = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Split:
    """procs: ranks; stage: ZeRO's; workers: processes per rank that decode; shared: ranks that share each row."""

    procs: int
    stage: int
    workers: int = 0
    shared: int = 1

    def __str__(self) -> str:
        together = f", rows shared by {self.shared}" if self.shared > 1 else ""
        return f"{self.procs} ranks, stage {self.stage}, {self.workers} workers{together}"


@dataclass(frozen=True)
class Spread:
    """Where the loss ends with several seeds. finals: by `run.seed`, the undisturbed run's first.

    rounding: relative, what a run on another split may differ by: a resumed run that follows an undisturbed run which
    is itself the lowest or the highest would else be outside by its last bits.
    """

    finals: dict[int, float]
    rounding: float

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest; where that is the undisturbed run's own, with the rounding around it."""
        undisturbed, *_ = self.finals.values()
        own = abs(undisturbed) * self.rounding
        return min(*self.finals.values(), undisturbed - own), max(*self.finals.values(), undisturbed + own)

    def __contains__(self, final: float) -> bool:
        low, high = self.bounds
        return low <= final <= high


@dataclass(frozen=True)
class Case:
    """What became of one killed and resumed run.

    how: what was killed, and when. resumed_from: step of the checkpoint, 0 for none. largest_difference: of losses and
    gradient norms against the undisturbed run, relative, over the first 20 steps after the resume, or (compared) as
    many as there are. final: the loss at the end. state_equal: all weights and optimizer states bit for bit, asked for
    on the same split only. in_spread: None where no other seeds were trained. faults: empty where it passed.
    """

    how: str
    split: str
    resumed_from: int
    compared: int
    largest_difference: float
    final: float
    data_equal: bool
    state_equal: bool | None
    in_spread: bool | None
    faults: tuple[str, ...]


class Trial:
    """A config that is trained again and again for a few steps, in run folders below `folder`."""

    def __init__(
        self,
        config: str,
        overrides: Sequence[str],
        folder: Path,
        *,
        steps: int,
        procs: int,
        say: Callable[[str], None] = print,
    ) -> None:
        """Raises ConfigError: the config is wrong, or the trial is too short to be killed in the middle."""
        if steps < 4:
            raise ConfigError(f"--steps: expected at least 4, got {steps}")
        if procs < 1:
            raise ConfigError(f"--procs: expected at least 1, got {procs}")
        self.config: RunConfig = load_run_config(config, overrides)
        engine = self.config.engine
        self.split = Split(procs, engine.zero_stage, self.config.batches.num_workers, engine.sequence_parallel)
        self.steps = steps
        self.every = max(1, steps // 5)
        self.folder = folder
        self.say = say
        self._words = [config, *overrides]
        folder.mkdir(parents=True, exist_ok=True)
        self.spread: Spread | None = None
        self.seconds = self._train_undisturbed()

    @property
    def tolerance(self) -> float:
        """What losses may differ by on another split, relative."""
        return TOLERANCE.get(self.config.engine.precision, LOW_PRECISION_TOLERANCE)

    def arguments(self, name: str, split: Split) -> list[str]:
        return [
            *self._words,
            f"run.name={name}",
            f"run.root={self.folder}",
            "run.resume=auto",
            f"run.max_steps={self.steps}",
            f"engine.zero_stage={split.stage}",
            f"engine.sequence_parallel={split.shared}",
            f"batches.num_workers={split.workers}",
            f"checkpoints.save_every_steps={self.every}",
            "tracking.log_every_steps=1",
            "tracking.wandb.mode=off",
        ]

    def _train_undisturbed(self) -> float:
        self.say(f"undisturbed: {self.steps} steps on {self.split} ...")
        started = time.monotonic()
        train_by_launcher(self.arguments("undisturbed", self.split), self.split.procs, self.folder / "undisturbed.log")
        seconds = time.monotonic() - started
        self.say(f"undisturbed: {seconds:.0f} s")
        return seconds

    def kill_past_a_checkpoint(self, name: str) -> str:
        """Start run `name` and kill a rank once it has a checkpoint."""
        step = train_and_kill(
            self.arguments(name, self.split), self.split.procs, self.folder / name, self.every, self._log(name)
        )
        return f"rank {self.split.procs - 1} past step {step}"

    def kill_at(self, name: str, moment: Moment, rank: int | None) -> bool:
        """Start run `name` and kill a rank, or all of it, at a moment; whether that moment came."""
        return train_and_kill_at(self.arguments(name, self.split), self.split.procs, moment, rank, self._log(name))

    def newest_step(self, name: str) -> int:
        """Of the newest whole checkpoint of run `name`; 0 where it has none."""
        latest = find_latest(self.folder / name / "checkpoints")
        return 0 if latest is None else int(latest.name.removeprefix("step-"))

    def train_seeds(self, count: int) -> Spread:
        """The undisturbed run again with the next seeds, `count` in all: other weights to start from, another order."""
        first = self.config.run.seed
        finals = {first: self.final("undisturbed")}
        for seed in range(first + 1, first + count):
            name = f"seed-{seed}"
            self.say(f"run.seed={seed}: {self.steps} steps on {self.split} ...")
            words = [*self.arguments(name, self.split), f"run.seed={seed}"]
            train_by_launcher(words, self.split.procs, self.folder / f"{name}.log")
            finals[seed] = self.final(name)
        self.spread = Spread(finals, self.tolerance)
        return self.spread

    def final(self, name: str) -> float:
        """Mean loss of the last tenth of the steps."""
        losses = [row["train/loss"] for _, row in sorted(self._metrics(name).items())]
        last = losses[-max(1, round(FINAL_SHARE * self.steps)) :]
        return sum(last) / len(last)

    def resume(self, name: str, how: str, split: Split) -> Case:
        """Go on with run `name` on `split` to the end, and compare with the undisturbed run."""
        step = self.newest_step(name)
        train_by_launcher(self.arguments(name, split), split.procs, self.folder / f"{name}.resumed.log")
        same = split == self.split
        largest = self._largest_difference(name, step)
        data_equal = self._data_digest(name) == self._data_digest("undisturbed")
        state_equal = self._state_digest(name) == self._state_digest("undisturbed") if same else None
        faults = [] if data_equal else ["the samples were others"]
        if same and (largest or not state_equal):
            faults.append("not equal bit for bit on the same split")
        if not largest <= self.tolerance:
            faults.append(f"losses differ by {largest:.1e}, allowed {self.tolerance:.0e}")
        final = self.final(name)
        in_spread = None if self.spread is None else final in self.spread
        if in_spread is False:
            faults.append(f"ends with a loss of {final:.6f}, outside the spread of the seeds")
        compared = min(COMPARED_STEPS, self.steps - step)
        return Case(how, str(split), step, compared, largest, final, data_equal, state_equal, in_spread, tuple(faults))

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.killed.log"

    def _largest_difference(self, name: str, after_step: int) -> float:
        """Relative; infinite where a step is missing."""
        ours, theirs = self._metrics(name), self._metrics("undisturbed")
        if ours.keys() != theirs.keys():
            return float("inf")
        steps = [step for step in theirs if after_step < step <= after_step + COMPARED_STEPS]
        pairs = [(ours[step][key], theirs[step][key]) for step in steps for key in _COMPARED]
        return max((abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs), default=0.0)

    def _metrics(self, name: str) -> dict[int, dict[str, float]]:
        rows = merge_steps(read_metrics(self.folder / name))
        return {row["step"]: row for row in rows if all(key in row for key in _COMPARED)}

    def _data_digest(self, name: str) -> str:
        return read_json(resolve_checkpoint(self.folder / name) / MANIFEST_FILE)["data_digest"]

    def _state_digest(self, name: str) -> str:
        """Of every weight and optimizer state, whole, whoever wrote which part."""
        reader, digest = SliceReader(resolve_checkpoint(self.folder / name)), hashlib.blake2b()
        for parameter, kinds in sorted(reader.index["slices"].items()):
            for kind in sorted(kinds):
                digest.update(f"{parameter}:{kind}".encode() + reader.read_full(parameter, kind).numpy().tobytes())
        return digest.hexdigest()
