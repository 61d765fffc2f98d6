"""The batch script, as a pure function: a description in, text out. It only sets the stage; the play is Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from trichord.config.cluster import ClusterConfig, SlurmConfig

TEMPLATE = Path(__file__).with_name("job.sh.j2")


@dataclass(frozen=True)
class Script:
    """What a batch script says.

    folder: of the submission, where the script, the log and `job.json` lie; cwd: where the ranks run.
    cells: how many jobs of an array, 0: no array; at_once: how many of them may run at a time.
    module: what the batch process runs.
    """

    run_name: str
    folder: Path
    cwd: Path
    cluster: ClusterConfig
    nodes: int
    time: str
    python: str
    cells: int = 0
    at_once: int | None = None
    module: str = "trichord_launch.batch"


def render_script(script: Script) -> str:
    """The text that sbatch is given."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["quote"] = shlex.quote
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run_name=script.run_name,
        options=_options(script),
        modules=script.cluster.modules,
        variables=_variables(script.cluster).items(),
        setup=script.cluster.setup,
        command=_command(script),
    )


def _options(script: Script) -> list[str]:
    slurm = script.cluster.slurm or SlurmConfig()
    log = "%A_%a.log" if script.cells else "%j.log"
    named = {
        "job-name": script.run_name,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": script.time,
        "nodes": script.nodes,
        "ntasks-per-node": script.cluster.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_task,
        "mem": slurm.memory,
        **_gpus(slurm, script.cluster.gpus_per_node),
        "array": _array(script),
        # The batch process alone is told, this long before the time limit, and on clusters that do so at preemption.
        "signal": f"B:USR1@{slurm.save_lead_s}",
        "chdir": _quoted(str(script.cwd)),
        "output": _quoted(f"{str(script.folder).replace('%', '%%')}/{log}"),
        "open-mode": "append",
        "wait-all-nodes": 1,
    }
    flags = [*(["--exclusive"] if slurm.exclusive else []), "--requeue" if slurm.requeue else "--no-requeue"]
    return [*(f"--{name}={value}" for name, value in named.items() if value is not None), *flags, *slurm.sbatch]


def _gpus(slurm: SlurmConfig, gpus: int) -> Mapping[str, str | int]:
    forms = {"gpus-per-node": {"gpus-per-node": gpus}, "gres": {"gres": f"gpu:{gpus}"}, "none": {}}
    return forms[slurm.gpu_option]


def _array(script: Script) -> str | None:
    if not script.cells:
        return None
    return f"0-{script.cells - 1}" + (f"%{script.at_once}" if script.at_once else "")


def _variables(cluster: ClusterConfig) -> dict[str, str]:
    """What the ranks find in their environment; the cluster file has the last word."""
    variables = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if cluster.network_interface:
        names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
        variables |= dict.fromkeys(names, cluster.network_interface)
    return {**variables, **cluster.env}


def _command(script: Script) -> str:
    """The last line; each job of an array reads its own `job.json`."""
    folder = shlex.quote(str(script.folder))
    job = f'{folder}/cells/"$SLURM_ARRAY_TASK_ID".json' if script.cells else f"{folder}/job.json"
    return f"{shlex.quote(script.python)} -m {script.module} {job}"


def _quoted(text: str) -> str:
    """For a line of sbatch, which knows double quotes, not the shell's rules."""
    return text if re.fullmatch(r"[^\s\"'\\]+", text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
