"""What tests on the real Slurm share: the cluster's commands, a run to submit, and waiting for what becomes of it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trichord.core.status import read_status
from trichord_launch.record import read_json
from trichord_launch.scheduler import parse_job

HERE = Path(__file__).parent
CONFIG = """\
run: {name: fake, root: ROOT, max_steps: 60}
shards: {sources: [{name: photos, shards: data/photos.tar}]}
batches: {tokenizer: data/tokenizer, rows_per_step: 4}
fusion: {kind: none}
encoders: {vision: {}, text: {}}
objectives: {contrastive: {pairs: [image-text]}}
"""
CLUSTER = """\
name: mini
nodes: 3
gpus_per_node: 2
env: {DS_ACCELERATOR: cpu, OMP_NUM_THREADS: "1"}
node_check: {min_disk_free_gib: 0.01, min_shm_free_gib: 0.01, timeout_s: 20}
slurm: {partition: low, cpus_per_task: 2, save_lead_s: 50}
"""


class Cluster:
    """The mini cluster. Every command has a limit."""

    def __init__(self, folder: Path):
        self.environment = {**os.environ, "MINI_SLURM_DIR": str(folder), "MINI_SLURM_GRACE": "15"}
        for name in ("SLURM_CONF", "TRICHORD_ATTEMPT", "SLURM_JOB_ID"):
            self.environment.pop(name, None)

    def script(self, *words: str, timeout_s: float = 60.0, check: bool = True) -> str:
        command = ["bash", str(HERE / "mini_cluster.sh"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=self.environment)
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, *words, timeout_s: float = 60.0, check: bool = True) -> str:
        """On the login node."""
        return self.script("run", *(str(word) for word in words), timeout_s=timeout_s, check=check)

    def launch(self, *words, code: int = 0) -> subprocess.CompletedProcess:
        """`trichord-launch` on the login node."""
        command = ["bash", str(HERE / "mini_cluster.sh"), "run", sys.executable, "-m", "trichord_launch.cli"]
        command += [str(word) for word in words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=self.environment)
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def job(self, job_id: str) -> dict[str, str]:
        return parse_job(self.run("scontrol", "-o", "show", "job", job_id))

    def node_processes(self) -> list[str]:
        """Command lines of all our ranks and runners on all nodes."""
        found = []
        for node in ("n1", "n2", "n3"):
            lines = self.script("node", node, "ps", "-eo", "args").splitlines()
            found += [line for line in lines if "slurm_rank" in line or "trichord_launch" in line]
        return found

    def make_whole(self) -> None:
        """All nodes up and idle, as a test before may have cut one off."""
        for node in ("n1", "n2", "n3"):
            if not self.script("node", node, "hostname", check=False).strip():
                self.script("start-node", node)
        wait_for(lambda: self.idle_nodes() == 3, 60, "the nodes to be idle", self.tell)

    def idle_nodes(self) -> int:
        return self.run("sinfo", "-h", "-p", "low", "-N", "-o", "%t").split().count("idle")

    def clear(self) -> None:
        self.run("scancel", "-u", "root", check=False)
        wait_for(lambda: not self.run("squeue", "-h").strip(), 60, "the queue to be empty", self.tell)

    def tell(self) -> str:
        return self.script("status", check=False)

    def stop(self) -> None:
        self.script("stop", check=False)


class World:
    """One test's run."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)
        self.config, self.cluster_file = folder / "fake.yaml", folder / "mini.yaml"
        self.config.write_text(CONFIG.replace("ROOT", str(folder / "runs")))
        self.cluster_file.write_text(CLUSTER)
        self.run_folder = folder / "runs" / "fake"

    def submit(self, plan: str = "finish", step_s: float = 0.02, nodes: int = 2, **more) -> str:
        """Submit a run of fake ranks, srun per rank unless told otherwise; the id of the (first) job."""
        fields = {"time": "10", "launcher": "srun", **more}
        words = [self.config, self.cluster_file, nodes, plan, step_s, json.dumps(fields)]
        return self.cluster.run(sys.executable, HERE / "submit_fake.py", *words).split()[0]

    def change_cluster(self, text: str, by: str) -> None:
        before = self.cluster_file.read_text()
        assert text in before
        self.cluster_file.write_text(before.replace(text, by))

    def wait_for(self, condition: Callable[[], object], limit_s: float, what: str) -> None:
        wait_for(condition, limit_s, what, self.tell)

    def wait_state(self, job_id: str, *states: str, limit_s: float = 60.0) -> dict[str, str]:
        """Until Slurm says that the job is in one of the states."""
        facts: dict[str, str] = {}

        def there() -> bool:
            facts.clear()
            facts.update(self.cluster.job(job_id))
            return facts["JobState"] in states

        wait_for(there, limit_s, f"job {job_id} to be {' or '.join(states)}", self.tell)
        return facts

    def preempt(self) -> None:
        """A job of a higher priority takes all nodes, for a second."""
        words = ["-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        high = self.cluster.run("sbatch", "--parsable", *words).strip()
        self.wait_state(high, "COMPLETED", limit_s=60)

    def hurry(self) -> None:
        """All steps from here on are quick: what was to be seen of a slow run has been seen."""
        (self.run_folder / "quick").touch()

    def node_of(self, job_id: str, number: int) -> str:
        """The name of one of the nodes of a running job."""
        return self.cluster.run("scontrol", "show", "hostnames", self.cluster.job(job_id)["NodeList"]).split()[number]

    def wait_step(self, step: int, limit_s: float = 60.0) -> None:
        """Until the ranks have agreed on that step."""
        wait_for(lambda: list(self.run_folder.glob(f"agree/*/{step}.0")), limit_s, f"step {step}", self.tell)

    def attempts(self) -> list[tuple[str, str]]:
        """(outcome, next) of each attempt."""
        verdicts = [self.verdict(attempt) for attempt in range(1, len(list(self.run_folder.glob("attempts/*"))) + 1)]
        return [(verdict["outcome"], verdict["next"]) for verdict in verdicts]

    def verdict(self, attempt: int) -> dict:
        return read_json(self.run_folder / "attempts" / str(attempt) / "verdict.json")

    def outcome(self) -> tuple[str, int]:
        status = read_status(self.run_folder)
        assert status is not None, self.tell()
        return status.outcome, status.exit_code

    def saves(self, rank: int) -> list[tuple[int, int, str]]:
        """(attempt, step, why) of each checkpoint of a rank."""
        lines = [line.split() for line in (self.run_folder / f"saves.{rank}").read_text().splitlines()]
        return [(int(attempt), int(step), why) for attempt, step, why in lines]

    def checkpoints(self) -> set[str]:
        return {path.read_text() for path in self.run_folder.glob("checkpoint.*")}

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.run_folder.glob("submissions/*/*.log")))

    def tell(self) -> str:
        """Everything a person would look at when a test fails."""
        logs = "".join(f"--- {p}\n{p.read_text()[-2000:]}" for p in sorted(self.run_folder.glob("attempts/*/*.log")))
        return f"{self.cluster.tell()}\n{self.log()}\n{logs}"


def wait_for(condition: Callable[[], object], limit_s: float, what: str, tell: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}\n{tell()}"
        time.sleep(0.2)
