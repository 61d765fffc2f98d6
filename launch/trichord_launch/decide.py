"""What comes after an attempt: a pure function of its verdict, of the attempts before it, and of Slurm's own plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trichord.core.errors import EXIT_STOPPED
from trichord_launch.job import Budget
from trichord_launch.record import PastAttempt
from trichord_launch.verdict import Verdict, why_not_restart


@dataclass(frozen=True)
class Situation:
    """What is known when the ranks have ended.

    earlier: attempts of this submission before this one. requeues: how often Slurm has put the job back so far.
    state: the job's, by Slurm; empty where it did not answer. asked: the batch process was told to stop.
    cancelled: by `trichord-launch cancel`. can_requeue: the cluster allows it. links_left: jobs of a chain after this.
    """

    verdict: Verdict
    earlier: Sequence[PastAttempt] = ()
    requeues: int = 0
    state: str = "RUNNING"
    asked: bool = False
    cancelled: bool = False
    can_requeue: bool = True
    links_left: int = 0


@dataclass(frozen=True)
class Next:
    """What to do. restart: in this job; requeue: put the job back into the queue; leave: end with `exit_code`.

    for_good: nothing will go on with this run by itself; the jobs of a chain after this one are taken out of the queue.
    crashed: the attempt counts against the budget of crashes.
    """

    action: Literal["leave", "requeue", "restart"]
    why: str
    exit_code: int = 0
    for_good: bool = False
    crashed: bool = False


def taken_away(state: str) -> bool:
    """Slurm is already ending this start of the job (cancelled, preempted, node lost, requeued by somebody)."""
    return state not in ("", "RUNNING", "CONFIGURING", "SUSPENDED")


def decide(now: Situation, budget: Budget, why: str = "") -> Next:
    """What comes next. Codes are those of the status files. why: of a stop, where it was not asked for."""
    verdict = now.verdict
    if verdict.outcome == "finished":
        return Next("leave", "finished", 0, for_good=True)
    if taken_away(now.state):
        return Next("leave", f"Slurm is ending this start of the job ({now.state})", verdict.exit_code)
    if now.cancelled:
        return Next("leave", "it was cancelled", verdict.exit_code, for_good=True)
    if verdict.outcome == "stopped":
        return _again_later(now, budget, why or "stopped with a checkpoint")
    return _after_failure(now, budget)


def _after_failure(now: Situation, budget: Budget) -> Next:
    verdict, crashes = now.verdict, [past for past in now.earlier if past.crashed]
    why = why_not_restart(verdict, crashes, budget.restarts, False, budget.same_step)
    if now.asked and verdict.exit_code not in (2, 3, 4):
        # It would have been stopped anyway; that it could not save is not held against it, the budget of requeues is.
        return _again_later(now, budget, "could not save before it had to stop; goes on from the last checkpoint")
    if why is not None:
        return Next("leave", f"not started again: {why}", verdict.exit_code, for_good=True, crashed=True)
    return Next("restart", f"crash {len(crashes) + 1} of at most {budget.restarts}", crashed=True)


def _again_later(now: Situation, budget: Budget, why: str) -> Next:
    if now.can_requeue:
        if now.requeues >= budget.requeues:
            over = f"{why}; not requeued: the budget of {budget.requeues} requeues is used up"
            return Next("leave", over, EXIT_STOPPED, for_good=True)
        return Next("requeue", why, EXIT_STOPPED)
    if now.links_left:
        return Next("leave", f"{why}; the next job of the chain goes on", EXIT_STOPPED)
    return Next("leave", f"{why}; this was the last job of the chain, submit the run again", EXIT_STOPPED)
