"""The srun commands of a job, as pure functions: a description in, argument list and environment out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trichord_launch.command import OWN_STORE, Command, rank_environment
from trichord_launch.job import NodeCheck, SlurmJob
from trichord_launch.ports import PORTS

# Slurm signals every process of a step, and the ranks alone shall answer: torchrun would die of USR1 and kills ranks
# that are slow to save after TERM. Ranks inherit this too, so that nothing is lost while they import; then they listen.
DEAF = ("bash", "-c", 'trap "" USR1 TERM; exec "$@"', "_")


@dataclass(frozen=True)
class Start:
    """One start of the ranks within a Slurm job. restart: how often Slurm had requeued it. host: the first node."""

    job_id: str
    restart: int
    attempt: int
    host: str
    port: int


def port_of(job_id: str, attempt: int) -> int:
    """A port that other jobs, and the attempt before, hardly have: for the rendezvous, or the store of rank 0."""
    return PORTS.start + (int(job_id) * 101 + attempt * 7) % len(PORTS)


def train_step(job: SlurmJob, start: Start, *, resume: bool = False) -> Command:
    """The step that trains. resume: this run has been started before, so `run.resume: never` no longer holds."""
    record = job.folder / "attempts" / str(start.attempt)
    tasks, log = (1, "node-%n.log") if job.launcher == "torchrun" else (job.ranks_per_node, "rank-%t.log")
    argv = [*_srun(job, tasks), "--kill-on-bad-exit=1", f"--output={_pattern(record)}/{log}"]
    argv += [*DEAF, *job.prefix, job.python, *job.runner]
    if job.launcher == "torchrun":
        argv += _torchrun(job, start, record)
    again = ["run.resume=auto"] if resume and job.resume == "never" else []
    return Command((*argv, *job.entry, job.config, *again), _environment(job, start))


def check_step(job: SlurmJob, folder: Path, nodes: Sequence[str] = ()) -> Command:
    """The step that looks at each node, one task on each; every task writes `folder/NODE.json`. nodes: only these."""
    argv = _srun(job, 1, len(nodes) or job.nodes)
    argv += [f"--nodelist={','.join(nodes)}"] if nodes else []
    argv += ["--kill-on-bad-exit=0", f"--output={_pattern(folder)}/%N.log"]
    argv += [*job.prefix, job.python]
    gpus = job.ranks_per_node if job.gpus else 0
    return Command((*argv, *check_words(job.check, folder, job.run_folder, gpus)), {})


def check_words(check: NodeCheck, folder: Path, run_folder: str, gpus: int) -> list[str]:
    """What Python is given to look at the node it runs on."""
    argv = ["-m", "trichord_launch.node_check", str(folder), run_folder, "--gpus", str(gpus)]
    argv += ["--disk-gib", f"{check.min_disk_free_gib:g}", "--shm-gib", f"{check.min_shm_free_gib:g}"]
    argv += ["--gpu-gib", f"{check.min_device_gib:g}"] if check.min_device_gib else []
    argv += ["--commit"] if check.commit else []
    argv += ["--token", *check.token] if check.token else []
    for option, values in (("--see", check.see), ("--command", check.commands)):
        argv += [word for value in values for word in (option, value)]
    return argv


def _srun(job: SlurmJob, tasks_per_node: int, nodes: int | None = None) -> list[str]:
    nodes = nodes or job.nodes
    argv = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]
    if job.cores is None:
        argv += ["--cpu-bind=none"]  # else one torchrun may be bound to one core
    else:
        argv += [f"--cpus-per-task={job.cores * job.ranks_per_node // tasks_per_node}"]
    return [*argv, *job.srun]


def _torchrun(job: SlurmJob, start: Start, record: Path) -> list[str]:
    return [
        f"{record}/torchrun",
        *("--nnodes", str(job.nodes), "--nproc-per-node", str(job.ranks_per_node)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{start.host}:{start.port}"),
        # Another id for every start: agents of the one before may still be leaving.
        *("--rdzv-id", f"{start.job_id}-{start.restart}-{start.attempt}"),
        *("--max-restarts", "0", "--tee", "3"),
        *("--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT"),
    ]


def _environment(job: SlurmJob, start: Start) -> Mapping[str, str]:
    variables = {
        "TRICHORD_ATTEMPT": str(start.attempt),
        **rank_environment(f"{job.run_folder}/torch_extensions/{start.job_id}", job.stop_timeout_s),
        **OWN_STORE,
        "TRICHORD_RANKS_PER_NODE": str(job.ranks_per_node),
    }
    if job.launcher == "srun":
        variables |= {"MASTER_ADDR": start.host, "MASTER_PORT": str(start.port)}
        # As under torchrun: ranks that saved leave with 0, since any other code would end those still leaving.
        variables |= {"TORCHELASTIC_RUN_ID": f"{start.job_id}-{start.restart}-{start.attempt}"}
    return variables


def _pattern(path: Path) -> str:
    return str(path).replace("%", "%%")
