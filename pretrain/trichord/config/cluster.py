"""Facts about a cluster that no run can know: what its nodes are, and how jobs get onto them."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from trichord.core.leaf import Leaf

Word = Annotated[str, StringConstraints(pattern=r"^[^\s\"'\\]+$")]
"""Goes into an `#SBATCH` line as it is: no blanks, no quotes."""
Line = Annotated[str, StringConstraints(pattern=r"^[^\r\n]+$")]
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][^\r\n]*$")]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]

TIME_PATTERN = r"^(\d+|(\d+-)?\d{1,2}:\d{2}:\d{2})$"
TIME_FORMS = "minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"


class GpuConfig(Leaf):
    """One GPU, as its data sheet says."""

    name: str
    memory_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    """Dense peak, in TFLOP/s."""


class ContainerConfig(Leaf):
    """A container for the ranks, started by the pyxis plugin of srun (enroot). The batch process stays outside."""

    image: Word
    """What `srun --container-image` takes: a squash file, or `docker://registry#image:tag`."""
    mounts: tuple[Word, ...] = ()
    """`SOURCE:TARGET[:FLAGS]`. The run folder, the data and the working directory must be seen under the same paths."""
    options: tuple[Option, ...] = ()
    """More options of srun, such as `--container-workdir=/work`."""
    python: Word = "python"
    """The interpreter inside."""


class NodeCheckConfig(Leaf):
    """What a node must pass before ranks are started on it. One that fails is left out, and the job is requeued."""

    min_disk_free_gib: float = Field(default=1.0, ge=0)
    """Free space where the run folder lies, and in the node's own temporary folder."""
    min_shm_free_gib: float = Field(default=1.0, ge=0)
    """Free space in /dev/shm, which data workers and NCCL use."""
    max_clock_skew_s: float = Field(default=5.0, gt=0)
    """How far the clocks of the nodes may be apart."""
    commands: tuple[Line, ...] = ()
    """Shell commands of your own, such as `dcgmi diag -r 1`; one that fails names the node."""
    timeout_s: float = Field(default=120.0, gt=0)
    """A node that has not answered after this long has failed."""


class SlurmConfig(Leaf):
    """How jobs are submitted; null keys are left out of the batch script."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_limit: str = Field(default="24:00:00", pattern=TIME_PATTERN)
    """Used where `--time` is not given."""
    gpu_option: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: `--gpus-per-node=8`, `--gres=gpu:8`, or not at all (whole nodes, or no GPUs)."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores per rank, data workers included. null: what the partition gives."""
    memory: Word | None = "0"
    """Per node; 0 is all of it."""
    exclusive: bool = True
    """Whole nodes: no other job beside this one."""
    requeue: bool = True
    """Whether a job may be put back into the queue. If not, links of a chain are submitted, each waiting for the one
    before."""
    save_lead_s: int = Field(default=300, ge=30, le=65535)
    """How long before the time limit ranks are asked to save and stop: the time of a checkpoint, 30 s by which Slurm
    may be late, and a margin."""
    sbatch: tuple[Option, ...] = ()
    """More `#SBATCH` lines: `--constraint=ib`, `--reservation=x`."""
    srun: tuple[Option, ...] = ()
    """More options of every srun: `--mpi=none`."""
    container: ContainerConfig | None = None
    task_prefix: tuple[str, ...] = ()
    """Words in front of the command on each node, for containers without pyxis: [apptainer, exec, --nv, image.sif]."""


class ClusterConfig(Leaf):
    """One cluster, read from `configs/clusters/*.yaml`, or from a file of your own."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    """Also the ranks on each node."""
    gpu: GpuConfig | None = None
    """null: not known; predictions of memory and time need it."""
    node_network_gb_per_s: float | None = Field(default=None, gt=0)
    """From one node to the others, all cards together, in gigabytes per second and direction. null: not known."""
    network_interface: Word | None = None
    """The interface over which ranks find each other (`ip -br addr` lists them). null: they choose."""
    python: Word | None = None
    """The interpreter on the nodes. null: the one that submits, by its path."""
    env: dict[VariableName, str] = Field(default_factory=dict)
    """Variables for the ranks."""
    modules: tuple[Word, ...] = ()
    """Loaded with `module load` before anything else."""
    setup: tuple[Line, ...] = ()
    """Shell commands on the first node before training: activate an environment, set limits."""
    node_check: NodeCheckConfig = NodeCheckConfig()
    slurm: SlurmConfig | None = None
    """null: no scheduler, processes are started by hand or by torchrun."""

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node
