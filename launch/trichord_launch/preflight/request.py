"""What is asked of a preflight, and where it leaves its record."""

from __future__ import annotations

import re
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trichord.config.cluster import TIME_FORMS, TIME_PATTERN, ClusterConfig
from trichord.config.identity import run_path
from trichord.config.load import load_cluster, load_run_config
from trichord.config.run import RunConfig
from trichord.core.errors import ConfigError
from trichord.core.status import write_atomically
from trichord_launch.job import NodeCheck
from trichord_launch.preflight.models import local_folder, references
from trichord_launch.preflight.plan_file import Plan, read_plan
from trichord_launch.preflight.shards import SourceFacts

LINKS_ENTRY = ("-m", "trichord.benchmarks.links")  # what each rank runs: torch, in processes on the nodes alone
TOKEN_FILE = "token"
_GIB = 2**30


@dataclass(frozen=True)
class Request:
    """What the user asks for. nodes, node_list: look at nodes of the cluster; procs: at this machine, with that many
    ranks. port: at which ranks are to meet, None: the launcher's choice. time: limit of the job that looks at nodes.
    """

    config: str
    overrides: Sequence[str] = ()
    cluster: str | None = None
    nodes: int | None = None
    node_list: tuple[str, ...] = ()
    procs: int | None = None
    plan: str | None = None
    fetch: bool = False
    port: int | None = None
    time: str = "10"

    @property
    def run_words(self) -> str:
        """The config and its overrides, as they are given to a command."""
        return shlex.join((self.config, *self.overrides))

    @property
    def wants_nodes(self) -> bool:
        return self.nodes is not None or bool(self.node_list)

    @property
    def node_count(self) -> int:
        return self.nodes or len(self.node_list)


@dataclass(frozen=True)
class Loaded:
    """The files of a request, read."""

    request: Request
    config: RunConfig
    cluster: ClusterConfig | None
    plan: Plan | None

    @property
    def asked_ranks(self) -> int | None:
        """Ranks of the nodes, or of this machine, that are to be looked at."""
        on_nodes = self.cluster is not None and self.request.wants_nodes
        return self.request.node_count * self.cluster.gpus_per_node if on_nodes else self.request.procs


def load(request: Request) -> Loaded:
    """Read them and check that they belong together.

    Raises:
        ConfigError: one does not load, or an option does not fit.
    """
    config = load_run_config(request.config, request.overrides)
    cluster = load_cluster(request.cluster) if request.cluster is not None else None
    plan = read_plan(Path(request.plan)).of(config) if request.plan is not None else None
    if request.wants_nodes:
        _check_nodes(request, cluster)
    if request.procs is not None and request.procs < 1:
        raise ConfigError(f"--procs must be at least 1, got {request.procs}")
    if request.port is not None and not 0 < request.port < 65536:
        raise ConfigError(f"--port must be 1 to 65535, got {request.port}")
    return Loaded(request, config, cluster, plan)


def _check_nodes(request: Request, cluster: ClusterConfig | None) -> None:
    if cluster is None or cluster.slurm is None:
        raise ConfigError(
            "--nodes and --nodes-list look at nodes of a Slurm cluster; name its file with --cluster (it needs a "
            "slurm: section), or look at this machine with --procs"
        )
    if request.procs is not None:
        raise ConfigError("--procs looks at this machine and --nodes at nodes of a cluster; give one of them")
    if request.nodes is not None and request.node_list and request.nodes != len(request.node_list):
        raise ConfigError(f"--nodes {request.nodes} and a list of {len(request.node_list)} nodes; give one of them")
    for node in request.node_list:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\[\]-]*", node):
            raise ConfigError(f"--nodes-list: {node!r} is no name of a node; expected such as n1,n2")
    if not re.fullmatch(TIME_PATTERN, request.time):
        raise ConfigError(f"--time: expected {TIME_FORMS}, got {request.time!r}")
    if not 1 <= request.node_count <= cluster.nodes:
        raise ConfigError(f"--nodes must be 1 to {cluster.nodes}, which {cluster.name} has; got {request.node_count}")


def new_record(config: RunConfig) -> Path:
    """A folder for what is found on nodes, `runs/NAME/preflight/TIME`, with the token that all nodes must see."""
    parent, stamp = run_path(config).absolute() / "preflight", time.strftime("%Y%m%d-%H%M%S")
    folder = parent / f"{stamp}-{secrets.token_hex(2)}"
    write_atomically(folder / TOKEN_FILE, secrets.token_hex(8) + "\n")
    return folder


def node_check(loaded: Loaded, record: Path, sources: Sequence[SourceFacts], device_bytes: int | None) -> NodeCheck:
    """What each node must pass: what a job asks of it, and what is known here of the run. device_bytes: that a rank
    needs by its plan."""
    limits = loaded.cluster.node_check.model_dump() if loaded.cluster is not None else {}
    gpu = loaded.cluster.gpu if loaded.cluster is not None else None
    token = (record / TOKEN_FILE).read_text(encoding="utf-8").strip()
    return NodeCheck(
        **limits,
        min_device_gib=max(gpu.memory_gib if gpu is not None else 0.0, (device_bytes or 0) / _GIB),
        commit=True,
        see=tuple(paths_to_see(loaded.config, sources)),
        token=(str(record / TOKEN_FILE), token),
    )


def paths_to_see(config: RunConfig, sources: Sequence[SourceFacts]) -> list[str]:
    """Files and folders on this machine's disks that every rank will open: models, and a shard of each source."""
    places = [place for reference in references(config) if (place := local_folder(reference)) is not None]
    shards = [facts.looks[0].url.removeprefix("file://") for facts in sources if facts.looks]
    found = [str(place.absolute()) for place in places]
    return [*found, *(str(Path(shard).absolute()) for shard in shards if Path(shard).exists())]
