"""Runs killed and resumed: `trichord selftest resume`, one past a checkpoint, and `chaos`, many at random moments."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trichord.config.run import RunConfig
from trichord.core.seed import derive_seed
from trichord.selftest.epochs import EpochsRead
from trichord.selftest.processes import WAIT_LIMIT_S, Moment
from trichord.selftest.training import Case, Split, Trial

MAX_WORKERS = 2
_MAX_DRAWS = 5
_LOOK_S = 0.002
_LONGEST_DELAY_S = 0.03
"""After a save or a step was seen to begin; a save of a tiny model takes 0.1 s."""


class AfterSeconds:
    """Any moment of a run's life, its start included."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.told = f"after {seconds:.1f} s"

    def comes(self, launcher: subprocess.Popen) -> bool:
        try:
            launcher.wait(timeout=self._seconds)
            return False
        except subprocess.TimeoutExpired:
            return True

    def holds(self) -> bool:
        return True


class InStep:
    """Past a number of steps, as `metrics.jsonl` has them."""

    def __init__(self, run: Path, step: int, delay_s: float) -> None:
        self._file = run / "metrics.jsonl"
        self._step, self._delay_s = step, delay_s
        self.told = f"past step {step}"

    def comes(self, launcher: subprocess.Popen) -> bool:
        return _wait_until(lambda: self._steps() >= self._step, launcher, self._delay_s)

    def holds(self) -> bool:
        return True

    def _steps(self) -> int:
        try:
            return self._file.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


class InSave:
    """While a checkpoint is written: its folder is there and is not yet renamed. From step `step` on."""

    def __init__(self, run: Path, step: int, delay_s: float) -> None:
        self._folder = run / "checkpoints"
        self._step, self._delay_s = step, delay_s
        self.told = f"in the first save from step {step} on"

    def comes(self, launcher: subprocess.Popen) -> bool:
        return _wait_until(self.holds, launcher, self._delay_s)

    def holds(self) -> bool:
        for path in self._folder.glob("step-*.partial-*"):
            step, _, attempt = path.name.removeprefix("step-").partition(".partial-")
            if attempt != "removed" and int(step) >= self._step:
                self.told = f"in the save of step {int(step)}"
                return True
        return False


def _wait_until(condition, launcher: subprocess.Popen, delay_s: float) -> bool:
    """And a little longer; False where the run ends first."""
    deadline = time.monotonic() + WAIT_LIMIT_S
    while not condition():
        if launcher.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    time.sleep(delay_s)
    return launcher.poll() is None


def resume_cases(trial: Trial, other: Split) -> list[Case]:
    """One run killed past a checkpoint, and resumed twice: on its own split, and on another."""
    how = trial.kill_past_a_checkpoint("killed")
    shutil.copytree(trial.folder / "killed", trial.folder / "killed-other", symlinks=True)
    cases = []
    for name, split in (("killed", trial.split), ("killed-other", other)):
        trial.say(f"killed {how}; going on with {split} ...")
        cases.append(trial.resume(name, how, split))
    return cases


def chaos_cases(trial: Trial, kills: int, seed: int) -> list[Case]:
    """Runs killed at random: every third in a save, every third past a step, every third at any moment of its life.
    Every second run is resumed on a random other split."""
    rng = random.Random(derive_seed(seed, "chaos"))
    cases = []
    for number in range(kills):
        name = f"killed-{number:03d}"
        how = kill_at_random(trial, name, ("save", "step", "any")[number % 3], rng)
        split = trial.split if number % 2 == 0 else random_split(trial, rng)
        case = trial.resume(name, how, split)
        cases.append(case)
        trial.say(
            f"{number + 1} of {kills}: killed {how}, resumed from {case.resumed_from} on {split}, largest difference "
            f"{case.largest_difference:.1e} over {case.compared} steps: {'; '.join(case.faults) or 'pass'}"
        )
        if not case.faults:
            shutil.rmtree(trial.folder / name)
    return cases


def kill_at_random(trial: Trial, name: str, kind: str, rng: random.Random) -> str:
    """Start run `name` and kill a rank or all of it, sooner where that was too late; says what and when."""
    share = 1.0
    for draw in range(_MAX_DRAWS):
        shutil.rmtree(trial.folder / name, ignore_errors=True)
        share *= rng.random()
        whole_job = rng.random() < 0.5 or (kind == "any" and draw > 0)  # there may have been no rank yet
        rank = None if whole_job else rng.randrange(trial.split.procs)
        moment = _moment(trial, trial.folder / name, kind, share, rng)
        killed = trial.kill_at(name, moment, rank)
        if killed and trial.newest_step(name) < trial.steps:  # else nothing is left to be done after it
            return f"{'all processes' if rank is None else f'rank {rank}'} {moment.told}"
    return "nothing: it had ended each time"


def _moment(trial: Trial, run: Path, kind: str, share: float, rng: random.Random) -> Moment:
    """share: of the run that is behind it, 0 to 1."""
    if kind == "any":
        return AfterSeconds(share * trial.seconds)
    delay_s = rng.uniform(0.0, _LONGEST_DELAY_S)
    if kind == "step":
        return InStep(run, 1 + int(share * (trial.steps - 1)), delay_s)
    saves = trial.steps // trial.every
    return InSave(run, trial.every * (1 + int(share * saves)), delay_s)


def random_split(trial: Trial, rng: random.Random) -> Split:
    """Another world size, stage or sharing of rows, and 0 to 2 workers; stages that the precision does not allow are
    left out."""
    stages = (0, 1, 2, 3) if trial.config.engine.precision in ("fp32", "autocast_bf16") else (1, 2, 3)
    if trial.config.engine.offload == "all":
        stages = (3,)
    elif trial.config.engine.offload == "optimizer":
        stages = (1, 2, 3)
    others = [
        Split(procs, stage, shared=shared)
        for procs in range(1, trial.split.procs + 2)
        for shared in ways_to_share(trial.config, procs)
        for stage in stages
    ]
    other = rng.choice([split for split in others if split != replace(trial.split, workers=0)])
    return replace(other, workers=rng.randint(0, MAX_WORKERS))


def ways_to_share(config: RunConfig, procs: int) -> list[int]:
    """How many of `procs` ranks may share each row (`engine.sequence_parallel`): 1, what the config has itself, and all
    else that fits the tokens of a micro-step and the trunk's heads, where the config tells these."""
    trunk, own = config.fusion.trunk, config.engine.sequence_parallel
    tokens = config.batches.micro_rows * config.batches.row_tokens
    told = trunk is not None and trunk.weights is None and not config.engine.compile

    def fits(size: int) -> bool:
        if size in (1, own):
            return True
        return told and tokens % size == 0 and _heads_divide(trunk.num_heads, trunk.num_kv_heads, size)

    return [size for size in range(1, procs + 1) if procs % size == 0 and fits(size)]


def _heads_divide(heads: int, key_heads: int, size: int) -> bool:
    """As `engine.sequence` asks it of the model."""
    return heads % size == 0 and (key_heads % size == 0 or size % key_heads == 0)


def to_json(trial: Trial, cases: Sequence[Case], epochs: EpochsRead | None = None) -> dict[str, Any]:
    spread = trial.spread
    return {
        "config": trial.config.run.name,
        "steps": trial.steps,
        "split": str(trial.split),
        "tolerance": trial.tolerance,
        "cases": [asdict(case) for case in cases],
        "spread": None if spread is None else {"finals": spread.finals, "bounds": list(spread.bounds)},
        "epochs": None if epochs is None else asdict(epochs),
        "passed": not any(case.faults for case in cases) and not (epochs is not None and epochs.faults),
    }
