"""Facts about a cluster that no run can know: what its nodes are, and how jobs get onto them."""

from pydantic import Field

from trichord.core.leaf import Leaf


class GpuConfig(Leaf):
    """One GPU, as its data sheet says."""

    name: str
    memory_gib: float = Field(gt=0)
    bf16_tflops: float = Field(gt=0)
    """Dense peak, in TFLOP/s."""


class SlurmConfig(Leaf):
    """How jobs are submitted; null keys are left out of the batch script."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str = Field(default="24:00:00", pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")


class ClusterConfig(Leaf):
    """One cluster, read from `configs/clusters/*.yaml`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    nodes: int = Field(ge=1)
    gpus_per_node: int = Field(ge=1)
    gpu: GpuConfig
    node_network_gb_per_s: float = Field(gt=0)
    """From one node to the others, all cards together, in gigabytes per second and direction."""
    slurm: SlurmConfig | None = None
    """null: no scheduler, processes are started by hand or by torchrun."""

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node
