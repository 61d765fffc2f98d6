"""`trichord selftest resume` and `chaos`: a user's own config, killed and resumed, against the same run undisturbed.

    undisturbed      N steps on split A
    killed, same     kill -9, then on with split A          equal bit for bit: losses, weights, optimizer states
    killed, other    kill -9, then on with another split    the same samples; losses to rounding

A split is world size, ZeRO stage and thread count: another one adds up gradients in another order.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trichord.checkpoints.load import find_latest, resolve_checkpoint
from trichord.checkpoints.manifest import MANIFEST_FILE, read_json
from trichord.checkpoints.slices import SliceReader
from trichord.config.load import load_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.core.seed import derive_seed
from trichord.selftest.processes import train_and_kill, train_and_kill_after, train_by_launcher
from trichord.tracking.metrics import merge_steps, read_metrics

COMPARED_STEPS = 20
TOLERANCE = {"fp32": 1e-5}
LOW_PRECISION_TOLERANCE = 2e-2
_MAX_DRAWS = 5
_COMPARED = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class Split:
    """procs: ranks; stage: ZeRO's."""

    procs: int
    stage: int

    def __str__(self) -> str:
        return f"{self.procs} ranks, stage {self.stage}"


@dataclass(frozen=True)
class Case:
    """What became of one killed and resumed run.

    how: what was killed, and when. resumed_from: step of the checkpoint, 0 for none. largest_difference: of losses and
    gradient norms against the undisturbed run, relative, over the first 20 steps after the resume. state_equal: all
    weights and optimizer states bit for bit, asked for on the same split only. faults: empty where it passed.
    """

    how: str
    split: str
    resumed_from: int
    largest_difference: float
    data_equal: bool
    state_equal: bool | None
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
        self.split = Split(procs, self.config.engine.zero_stage)
        self.steps = steps
        self.every = max(1, steps // 5)
        self.folder = folder
        self.say = say
        self._words = [config, *overrides]
        folder.mkdir(parents=True, exist_ok=True)
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

    def kill_at_random(self, name: str, rng: random.Random) -> str:
        """Start run `name` and kill it at any moment of its life, saves included; sooner where it was too late."""
        seconds, whole_job = rng.uniform(0.0, self.seconds), rng.random() < 0.5
        for _ in range(_MAX_DRAWS):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            if train_and_kill_after(
                self.arguments(name, self.split), self.split.procs, seconds, whole_job, self._log(name)
            ):
                return f"{'all processes' if whole_job else 'a rank'} after {seconds:.1f} s"
            seconds, whole_job = rng.uniform(0.0, seconds), whole_job or seconds < 1.0
        return "nothing: it had ended each time"

    def resume(self, name: str, how: str, split: Split) -> Case:
        """Go on with run `name` on `split` to the end, and compare with the undisturbed run."""
        latest = find_latest(self.folder / name / "checkpoints")
        step = 0 if latest is None else int(latest.name.removeprefix("step-"))
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
        return Case(how, str(split), step, largest, data_equal, state_equal, tuple(faults))

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


def resume_cases(trial: Trial, other: Split) -> list[Case]:
    """One run killed past a checkpoint, and resumed twice: on its own split, and on another."""
    how = trial.kill_past_a_checkpoint("killed")
    shutil.copytree(trial.folder / "killed", trial.folder / "killed-other")
    cases = []
    for name, split in (("killed", trial.split), ("killed-other", other)):
        trial.say(f"killed {how}; going on with {split} ...")
        cases.append(trial.resume(name, how, split))
    return cases


def chaos_cases(trial: Trial, kills: int, seed: int) -> list[Case]:
    """Runs killed at random instants; every second one is resumed on a random other split."""
    rng = random.Random(derive_seed(seed, "chaos"))
    cases = []
    for number in range(kills):
        name = f"killed-{number:03d}"
        how = trial.kill_at_random(name, rng)
        split = trial.split if number % 2 == 0 else random_split(trial, rng)
        cases.append(trial.resume(name, how, split))
        verdict = "; ".join(cases[-1].faults) or "pass"
        trial.say(f"{number + 1} of {kills}: killed {how}, resumed from {cases[-1].resumed_from} on {split}: {verdict}")
        shutil.rmtree(trial.folder / name)
    return cases


def random_split(trial: Trial, rng: random.Random) -> Split:
    """Another world size or stage; stages that the precision does not allow are left out."""
    stages = (0, 1, 2, 3) if trial.config.engine.precision in ("fp32", "autocast_bf16") else (1, 2, 3)
    if trial.config.engine.offload == "all":
        stages = (3,)
    elif trial.config.engine.offload == "optimizer":
        stages = (1, 2, 3)
    others = [Split(procs, stage) for procs in range(1, trial.split.procs + 2) for stage in stages]
    return rng.choice([split for split in others if split != trial.split])


def to_json(trial: Trial, cases: Sequence[Case]) -> dict[str, Any]:
    return {
        "config": trial.config.run.name,
        "steps": trial.steps,
        "split": str(trial.split),
        "tolerance": trial.tolerance,
        "cases": [asdict(case) for case in cases],
        "passed": not any(case.faults for case in cases),
    }
