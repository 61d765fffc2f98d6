"""The life of a Slurm job: `python -m trichord_launch.batch JOB.json`, on its first node, as the batch process itself.

Each attempt: look at the nodes, start the ranks with one srun, pass a stop on to them, judge by the status files alone,
and decide: leave, start again in this job, or put the job back into the queue. A job that has saved and simply ended
would not be requeued by Slurm, so it requeues itself. What happens is told in the log of the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from trichord.core.errors import EXIT_CONFIG, EXIT_STOPPED, TrichordError
from trichord.core.status import write_atomically
from trichord_launch import scheduler
from trichord_launch.decide import Next, Situation, decide
from trichord_launch.job import SlurmJob, read_job
from trichord_launch.nodes import check_nodes, too_many
from trichord_launch.ports import free_port
from trichord_launch.record import begin_attempt, end_attempt, last_known_step, next_attempt, past_attempts, read_json
from trichord_launch.steps import Start, port_of, train_step
from trichord_launch.supervise import StopSignals, run_lock
from trichord_launch.training_step import TrainingStep, clear_stale_locks
from trichord_launch.verdict import Verdict, first_death, judge

CANCEL_FILE = "cancel"  # in the submission's folder: a stop is for good
ENDED_FILE = "ended.json"  # nothing will go on with the run by itself
LINKS_FILE = "links.json"  # the job ids of this submission, in the order in which they start
_RESTART_PAUSE_S = 2.0
_REQUEUE_WAIT_S = 600.0


class Batch:
    """One start of a job by Slurm. exclude: nodes on which it must not start again."""

    def __init__(self, job: SlurmJob, signals: StopSignals, environ: Mapping[str, str]):
        self.job, self.signals = job, signals
        self.job_id = environ["SLURM_JOB_ID"]
        self.host = environ["SLURMD_NODENAME"]
        self.requeues = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = scheduler.host_names(environ["SLURM_JOB_NODELIST"])
        self.submission = Path(job.submission)
        self.exclude: list[str] = []

    def live(self) -> int:
        """Attempts until one is the last in this job; returns the exit code."""
        say(f"job {self.job_id}, start {self.requeues + 1}, on {', '.join(self.nodes)}")
        self._close_lost_attempts()
        for name in (ENDED_FILE, CANCEL_FILE):
            if (self.submission / name).exists():
                say(f"nothing to do: {read_json(self.submission / name).get('why', 'cancelled')}")
                return 0
        if self.requeues > self.job.budget.requeues:
            why = f"Slurm has requeued the job {self.requeues} times, {self.job.budget.requeues} are allowed"
            return self._leave(Next("leave", why, EXIT_STOPPED, for_good=True))
        while True:
            after = self._attempt()
            say(f"{after.action}: {after.why}")
            if after.action != "restart":
                return self._leave(after)
            self.signals.pause(_RESTART_PAUSE_S)

    def _attempt(self) -> Next:
        """One start of the ranks, from its record to the decision what comes next."""
        attempt, earlier = next_attempt(self.job.folder), past_attempts(self.job.folder, self.job.submission_id)
        start = Start(self.job_id, self.requeues, attempt, self.host, free_port(port_of(self.job_id, attempt)))
        command = train_step(self.job, start, resume=bool(earlier))
        facts = {
            "submission": self.job.submission_id,
            "job_id": self.job_id,
            "requeues": self.requeues,
            "nodes": self.nodes,
            "ranks_per_node": self.job.ranks_per_node,
        }
        record, began = begin_attempt(self.job.folder, attempt, command, facts), time.monotonic()
        with contextlib.suppress(TrichordError):
            write_atomically(record / "job.txt", scheduler.job_text(self.job_id))
        clear_stale_locks(Path(command.environment["TORCH_EXTENSIONS_DIR"]))
        after = self._look_at_nodes(record)
        verdict, code = (after[0], None) if after else self._train(attempt, command, record)
        now = after[1] if after else self._decide(verdict, earlier)
        say(f"attempt {attempt}: {verdict.outcome} at step {verdict.step}: {verdict.reason}")
        more = {
            "seconds": round(time.monotonic() - began, 3),
            "srun_exit_code": code,
            "next": now.action,
            "why": now.why,
            "crashed": now.crashed,
        }
        end_attempt(self.job.folder, attempt, verdict, more)
        return now

    def _train(self, attempt: int, command, record: Path) -> tuple[Verdict, int | None]:
        say(f"attempt {attempt}: {self.job.ranks} ranks, logs under {record}")
        step = TrainingStep(self.job.folder, attempt, command, self.job_id, self.signals, say)
        code = step.run()
        received = self.signals.received
        return judge(self.job.folder, received[0] if received else None, first_death(record)), code

    def _look_at_nodes(self, record: Path) -> tuple[Verdict, Next] | None:
        """None where the ranks can be started; else why not, and what comes next."""
        bad = check_nodes(self.job, self.nodes, record / "node_check", lambda: bool(self.signals.received))
        step = last_known_step(self.job.folder)
        if self.signals.received:
            verdict = Verdict("stopped", EXIT_STOPPED, step, "asked to stop before training began")
            return verdict, self._decide(verdict, [])
        if not bad:
            return None
        told = "; ".join(f"{node}: {why}" for node, why in bad.items())
        facts = scheduler.job_facts(self.job_id)
        excluded = scheduler.host_names(facts.get("ExcNodeList", ""))
        if too_many(bad, excluded, self.nodes):
            verdict = Verdict("failed", EXIT_CONFIG, step, f"too many nodes failed their check ({told})")
            return verdict, Next("leave", "not the nodes but what they were asked for is at fault", EXIT_CONFIG, True)
        self.exclude = sorted({*excluded, *bad})
        verdict = Verdict("failed", 1, step, f"nodes failed their check ({told})")
        stopped = Verdict("stopped", EXIT_STOPPED, step, "")
        return verdict, self._decide(stopped, [], f"without {', '.join(bad)}, which failed the check")

    def _decide(self, verdict: Verdict, earlier, why: str = "") -> Next:
        now = Situation(
            verdict,
            earlier,
            requeues=self.requeues,
            state=scheduler.job_facts(self.job_id).get("JobState", ""),
            asked=bool(self.signals.received),
            cancelled=(self.submission / CANCEL_FILE).exists(),
            can_requeue=self.job.requeue,
            links_left=len(self._links_left()),
        )
        return decide(now, self.job.budget, why)

    def _leave(self, after: Next) -> int:
        """Do what was decided, and end."""
        if after.for_good:
            facts = {"why": after.why, "exit_code": after.exit_code, "time": time.time()}
            write_atomically(self.submission / ENDED_FILE, json.dumps(facts) + "\n")
            self._tell_links(scheduler.cancel)
        elif after.action == "requeue":
            self._requeue()
        elif self.exclude:
            self._tell_links(lambda links: [scheduler.exclude_nodes(link, self.exclude) for link in links])
        return after.exit_code

    def _requeue(self) -> None:
        """Back into the queue. Slurm then ends this process; it never runs on into the time of the next start."""
        before = len(self.signals.received)
        try:
            scheduler.requeue(self.job_id, self.exclude)
        except TrichordError as error:
            say(f"Slurm does not requeue the job: {error}; submit the run again")
            return
        deadline = time.monotonic() + _REQUEUE_WAIT_S
        while signal.SIGTERM not in self.signals.received[before:] and time.monotonic() < deadline:
            time.sleep(0.1)

    def _links_left(self) -> list[str]:
        """Jobs of the chain that come after this one."""
        links = read_json(self.submission / LINKS_FILE).get("job_ids", [])
        return links[links.index(self.job_id) + 1 :] if self.job_id in links else []

    def _tell_links(self, tell) -> None:
        links = self._links_left()
        try:
            if links:
                tell(links)
        except TrichordError as error:
            say(str(error))

    def _close_lost_attempts(self) -> None:
        """Give attempts a verdict whose batch process died with its node, or was killed."""
        for past in past_attempts(self.job.folder, self.job.submission_id):
            if past.lost:
                step = last_known_step(self.job.folder)
                verdict = Verdict("failed", 1, step, "its node was lost, or Slurm killed it before it could end")
                end_attempt(self.job.folder, past.attempt, verdict, {"lost": True, "crashed": False, "next": "requeue"})


def say(text: str) -> None:
    """To the job's log."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} trichord-launch: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The batch process."""
    numbers = (signal.SIGUSR1, signal.SIGTERM)
    with StopSignals(numbers, ignored_too=True) as signals:  # before anything that takes time
        try:
            job = read_job(Path(sys.argv[1]))
            with run_lock(job.folder):
                return Batch(job, signals, os.environ).live()
        except TrichordError as error:
            say(f"error: {error}")
            return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
