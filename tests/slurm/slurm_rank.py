"""A rank without torch, for jobs on a real Slurm: all ranks take steps together, agree on a stop, and save at one step.

    slurm_rank.py PLAN STEP_S CONFIG [overrides ...]

The run folder is the one in which CONFIG is a submission's snapshot.

PLAN is one word per attempt, joined by commas; the last one holds for all further attempts:
    finish       take steps to the end
    crash@N      the last rank dies of SIGKILL at step N, without a word
    fail@N=C     the last rank says it failed at step N with exit code C, and leaves
Ranks agree through files where real ones use collectives. A checkpoint (every 10 steps, and at a stop) holds the step
and a digest over all steps so far, so a step that is left out or taken twice shows. `saves.R` has a line for each:
attempt, step, why. A file `quick` in the folder makes all further steps quick.
"""

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from trichord.core.status import Status, current_attempt, write_atomically, write_rank_status, write_status

TOTAL_STEPS = 60
SAVE_EVERY = 10
PEER_TIMEOUT_S = 4.0


def digest_of(steps: int) -> str:
    """What an undisturbed run of that many steps arrives at."""
    digest = ""
    for step in range(1, steps + 1):
        digest = next_digest(digest, step)
    return digest


def next_digest(digest: str, step: int) -> str:
    return hashlib.sha256(f"{digest}{step}".encode()).hexdigest()


class Rank:
    def __init__(self, folder: Path, word: str, step_s: float):
        self.folder, self.word, self.step_s = folder, word, step_s
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.attempt = current_attempt()
        self.received: list[int] = []
        self.step, self.digest = 0, ""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda received, _: self.received.append(received))

    def run(self) -> int:
        saved = self.folder / f"checkpoint.{self.rank}"
        if saved.exists():
            step, self.digest = saved.read_text().split(" ")
            self.step = int(step)
        self.agree("begin", 30.0)
        self.say("running", 0, "")
        while self.step < TOTAL_STEPS:
            time.sleep(0.02 if (self.folder / "quick").exists() else self.step_s)
            self.step += 1
            self.end_here()
            self.digest = next_digest(self.digest, self.step)
            stop = self.agree(str(self.step), PEER_TIMEOUT_S)
            if stop or self.step % SAVE_EVERY == 0:
                self.save("stop" if stop else "time")
            if stop:
                self.say("stopped", 75, "stopped by a signal with a checkpoint")
                return 0
        self.save("end")
        self.say("finished", 0, "all steps done")
        return 0

    def agree(self, what: str, timeout_s: float) -> bool:
        """An all-reduce of the stop flag: true on all ranks at the same step, or on none."""
        folder = self.folder / "agree" / str(self.attempt)
        write_atomically(folder / f"{what}.{self.rank}", str(int(bool(self.received))))
        deadline = time.monotonic() + timeout_s
        for rank in range(self.world_size):
            while not (folder / f"{what}.{rank}").exists():
                if time.monotonic() > deadline:
                    self.fail(1, f"rank {rank} has shown no sign of life")
                time.sleep(0.02)
        return any((folder / f"{what}.{rank}").read_text() == "1" for rank in range(self.world_size))

    def end_here(self) -> None:
        kind, _, rest = self.word.partition("@")
        at, _, code = rest.partition("=")
        if self.rank != self.world_size - 1 or not rest or self.step != int(at):
            return
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        self.fail(int(code), f"told to fail at step {self.step}")

    def fail(self, code: int, reason: str) -> None:
        write_rank_status(self.folder, self.rank, Status("failed", code, self.step - 1, reason, self.attempt))
        os._exit(code)

    def save(self, why: str) -> None:
        write_atomically(self.folder / f"checkpoint.{self.rank}", f"{self.step} {self.digest}")
        with open(self.folder / f"saves.{self.rank}", "a") as file:
            file.write(f"{self.attempt} {self.step} {why}\n")
        self.agree(f"saved-{self.step}", PEER_TIMEOUT_S)

    def say(self, outcome, code: int, reason: str) -> None:
        if self.rank == 0:
            write_status(self.folder, Status(outcome, code, self.step, reason, self.attempt))


def main() -> int:
    plan, step_s, folder = sys.argv[1].split(","), float(sys.argv[2]), Path(sys.argv[3]).parents[2]
    word = plan[min(current_attempt(), len(plan)) - 1]
    told = f"rank {os.environ['RANK']} on {os.uname().nodename}: {' '.join(sys.argv[1:])}\n"
    sys.stdout.write(told)
    write_atomically(folder / "logs" / f"rank-{int(os.environ['RANK']):05d}.log", told)
    return Rank(folder, word, step_s).run()


if __name__ == "__main__":
    sys.exit(main())
