"""`trichord-launch cluster new`: a first cluster file from what sinfo and scontrol say, to be read and completed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trichord.config.load import load_cluster
from trichord.core.errors import ConfigError
from trichord_launch import scheduler

_FORMAT = "%R|%D|%c|%G|%l|%a"
# From the makers' data sheets, by a word in the name that Slurm gives the GPUs: memory in GiB, dense bf16 TFLOP/s.
_GPUS = {
    "h200": ("H200 SXM 141GB", 131.0, 989),
    "h100": ("H100 SXM 80GB", 79.6, 989),
    "a100": ("A100 SXM 80GB", 79.2, 312),
    "l40s": ("L40S 48GB", 44.5, 362),
    "mi300x": ("MI300X 192GB", 191.5, 1307),
}


@dataclass(frozen=True)
class Partition:
    """One line of sinfo. cpus: of a node; gpus: of a node; gpu_type: empty where Slurm does not say."""

    name: str
    nodes: int
    cpus: int
    gpus: int
    gpu_type: str
    time_limit: str


def read_partitions(text: str) -> list[Partition]:
    """The lines of `sinfo --format`: one per partition and kind of node."""
    found = []
    for line in text.splitlines():
        name, nodes, cpus, gres, limit, state = (line.split("|") + [""] * 6)[:6]
        if state != "up":
            continue
        # gpu:8, gpu:h100:8, gpu:h100:8(S:0-1)
        gpu = re.search(r"\bgpu:(?:([\w.-]+):)?(\d+)", gres)
        kind, count = (gpu[1] or "", int(gpu[2])) if gpu else ("", 0)
        found.append(Partition(name, int(nodes), int(cpus.rstrip("+")), count, kind, limit))
    return found


def draft(name: str, partition: Partition, requeue: bool) -> str:
    """The file's text."""
    ranks = max(1, partition.gpus)
    known = next((facts for word, facts in _GPUS.items() if word in partition.gpu_type.lower()), None)
    gpu = f"{{name: {known[0]}, memory_gib: {known[1]}, bf16_tflops: {known[2]}}}" if known else "null"
    limit = partition.time_limit if re.fullmatch(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", partition.time_limit) else "24:00:00"
    lines = [
        f"# Drafted from sinfo, partition {partition.name}. Read it, complete it; every key with its meaning:",
        "# trichord config schema --of cluster",
        f"name: {name}",
        f"nodes: {partition.nodes}",
        f"gpus_per_node: {ranks}"
        + ("" if partition.gpus else " # Slurm knows of no GPU here: one rank per node, on the CPU"),
        f"gpu: {gpu} # {'by its name; compare with the data sheet' if known else 'name, memory_gib, bf16_tflops'}",
        "# node_network_gb_per_s: 50 # from a node to the others, all cards together",
        "# network_interface: ib0 # as `ip -br addr` on a node lists it",
        "# modules: [cuda]",
        "# setup: [source /path/to/venv/bin/activate]",
        *([] if partition.gpus else ["env: {DS_ACCELERATOR: cpu}"]),
        "slurm:",
        f"  partition: {partition.name}",
        "  # account: your-account",
        f'  time_limit: "{limit}"',
        f"  gpu_option: {'gpus-per-node' if partition.gpus else 'none'}",
        f"  cpus_per_task: {max(1, partition.cpus // ranks)}",
        f"  requeue: {str(requeue).lower()} # JobRequeue of this Slurm",
        "  save_lead_s: 300 # a checkpoint's time, 30 s, and a margin",
    ]
    return "\n".join(lines) + "\n"


def write_draft(name: str, partition: str | None = None, folder: Path | None = None) -> Path:
    """Write `NAME.yaml` from what Slurm says; returns its path.

    Raises:
        ConfigError: no Slurm here, no such partition, or the file exists.
    """
    try:
        known = read_partitions(scheduler.run("sinfo", "--noheader", f"--format={_FORMAT}", tries=2))
    except (ConfigError, scheduler.SchedulerError) as error:
        raise ConfigError(
            f"Slurm cannot be asked here: {error}\nrun this on a login node, or begin with a copy of an example in "
            "configs/clusters/"
        ) from error
    wanted = [entry for entry in known if partition in (None, entry.name)]
    if not wanted:
        names = ", ".join(sorted({entry.name for entry in known})) or "none"
        raise ConfigError(f"no partition {partition!r} that is up; there are: {names}")
    best = max(wanted, key=lambda entry: (entry.gpus > 0, entry.nodes * max(1, entry.gpus)))
    requeue = re.search(r"^JobRequeue\s*=\s*0", scheduler.run("scontrol", "show", "config", tries=2), re.M) is None
    path = (folder or Path()) / f"{name}.yaml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(draft(name, best, requeue))
    except FileExistsError:
        raise ConfigError(f"{path} exists; choose another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    load_cluster(path)
    return path
