"""The batch script and the srun commands, word for word."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from trichord.config.cluster import ClusterConfig
from trichord.core.errors import ConfigError
from trichord_launch.job import RANK_RUNNER, Budget, NodeCheck, SlurmJob, read_job
from trichord_launch.node import threads_per_rank, torchrun_options
from trichord_launch.ports import PORTS
from trichord_launch.rank import rank_variables
from trichord_launch.script import Script, render_script
from trichord_launch.steps import Start, check_step, port_of, train_step

CLUSTER = ClusterConfig.model_validate(
    {
        "name": "big",
        "nodes": 64,
        "gpus_per_node": 8,
        "network_interface": "ib0",
        "env": {"NCCL_DEBUG": "WARN", "MOTTO": "it's fine"},
        "modules": ["cuda/12.8"],
        "setup": ["source /opt/venv/bin/activate", "ulimit -n 65536"],
        "slurm": {
            "partition": "gpu",
            "account": "team",
            "cpus_per_task": 12,
            "save_lead_s": 240,
            "sbatch": ["--constraint=ib"],
        },
    }
)
SCRIPT = Script(
    run_name="digits",
    folder=Path("/data/runs/digits/submissions/20260102-030405"),
    cwd=Path("/home/user/my work"),
    cluster=CLUSTER,
    nodes=2,
    time="24:00:00",
    python="/opt/venv/bin/python",
)
GOLDEN = """\
#!/bin/bash
# Run digits. Written by trichord-launch; the life of the job is in trichord_launch/batch.py.
#SBATCH --job-name=digits
#SBATCH --partition=gpu
#SBATCH --account=team
#SBATCH --time=24:00:00
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:USR1@240
#SBATCH --chdir="/home/user/my work"
#SBATCH --output=/data/runs/digits/submissions/20260102-030405/%j.log
#SBATCH --open-mode=append
#SBATCH --wait-all-nodes=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --constraint=ib
# shellcheck disable=SC1090,SC1091
set -eo pipefail
trap '' USR1 # a signal to save that comes before there is anything to save must not end the job

module load cuda/12.8

export HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED=1
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export TP_SOCKET_IFNAME=ib0
export NCCL_DEBUG=WARN
export MOTTO='it'"'"'s fine'

source /opt/venv/bin/activate
ulimit -n 65536

exec /opt/venv/bin/python -m trichord_launch.batch /data/runs/digits/submissions/20260102-030405/job.json
"""

JOB = SlurmJob(
    run_name="digits",
    run_folder="/data/runs/digits",
    submission="/data/runs/digits/submissions/20260102-030405",
    config="/data/runs/digits/submissions/20260102-030405/config.yaml",
    resume="never",
    nodes=2,
    ranks_per_node=8,
    cores=12,
    python="/opt/venv/bin/python",
    srun=("--mpi=none",),
    stop_timeout_s=630.5,
    check=NodeCheck(commands=("dcgmi diag -r 1",)),
)
START = Start(job_id="77", restart=1, attempt=3, host="n1", port=27798)
STEP = """\
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 --mpi=none --kill-on-bad-exit=1
--output=/data/runs/digits/attempts/3/node-%n.log
bash -c trap "" USR1 TERM; exec "$@" _
/opt/venv/bin/python -m trichord_launch.node /data/runs/digits/attempts/3/torchrun
--nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint n1:27798 --rdzv-id 77-1-3 --max-restarts 0 --tee 3
--signals-to-handle SIGINT,SIGHUP,SIGQUIT
-m trichord.cli train /data/runs/digits/submissions/20260102-030405/config.yaml"""


def test_the_whole_script_is_as_agreed():
    assert render_script(SCRIPT) == GOLDEN


def variants():
    slurm = {"requeue": False, "gpu_option": "gres", "memory": None, "exclusive": False, "qos": "long"}
    plain = ClusterConfig.model_validate({"name": "s", "nodes": 1, "gpus_per_node": 2, "slurm": slurm})
    return [
        SCRIPT,
        replace(SCRIPT, cells=4, at_once=2),
        replace(SCRIPT, cluster=plain),
        replace(SCRIPT, python="py thon"),
    ]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install -y shellcheck")
@pytest.mark.parametrize("number", range(4))
def test_shellcheck_finds_nothing(number, tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(render_script(variants()[number]))
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_an_array_reads_a_job_per_task():
    text = render_script(replace(SCRIPT, cells=4, at_once=2))
    assert "#SBATCH --array=0-3%2\n" in text
    assert 'submissions/20260102-030405/cells/"$SLURM_ARRAY_TASK_ID".json\n' in text
    assert "/%A_%a.log\n" in text


def test_what_a_cluster_leaves_out_is_left_out():
    text = render_script(variants()[2])
    for line in ("--no-requeue", "--gres=gpu:2", "--qos=long"):
        assert f"#SBATCH {line}\n" in text
    for word in ("--mem", "--exclusive", "--partition", "--cpus-per-task", "module", "None", "SOCKET_IFNAME"):
        assert word not in text


def test_the_step_is_as_agreed():
    step = train_step(JOB, START)
    assert " ".join(step.argv) == STEP.replace("\n", " ")
    assert step.environment == {
        "TRICHORD_ATTEMPT": "3",
        "TORCH_EXTENSIONS_DIR": "/data/runs/digits/torch_extensions/77",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "631",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TRICHORD_RANKS_PER_NODE": "8",
    }
    assert train_step(JOB, START, resume=True).argv[-1] == "run.resume=auto", "the first start has made the run"
    assert train_step(replace(JOB, resume="auto"), START, resume=True).argv[-1].endswith("config.yaml")


def test_srun_can_start_each_rank():
    step = train_step(replace(JOB, launcher="srun", runner=RANK_RUNNER), START)
    text = " ".join(step.argv)
    assert "--ntasks=16 --ntasks-per-node=8 --cpus-per-task=12" in text
    assert "-m trichord_launch.rank -m trichord.cli train" in text
    assert "rank-%t.log" in text
    assert (step.environment["MASTER_ADDR"], step.environment["MASTER_PORT"]) == ("n1", "27798")
    assert step.environment["TORCHELASTIC_RUN_ID"] == "77-1-3"


def test_containers_stand_before_the_interpreter():
    argv = train_step(replace(JOB, prefix=("apptainer", "exec", "x.sif"), python="python"), START).argv
    at = argv.index("apptainer")
    assert argv[at - 1] == "_"
    assert argv[at : at + 4] == ("apptainer", "exec", "x.sif", "python")


def test_the_check_looks_at_all_nodes_or_at_some():
    argv = " ".join(check_step(JOB, Path("/r/check")).argv)
    assert "--nodes=2 --ntasks=2 " in argv
    assert "--kill-on-bad-exit=0" in argv
    assert argv.endswith("/r/check /data/runs/digits --gpus 8 --disk-gib 1 --shm-gib 1 --command dcgmi diag -r 1")
    assert "--nodes=1 --ntasks=1 " in " ".join(check_step(JOB, Path("/r"), ["n2"]).argv)
    assert "--gpus 0" in " ".join(check_step(replace(JOB, gpus=False), Path("/r")).argv)


def test_ports_differ_from_attempt_to_attempt_and_from_job_to_job():
    ports = {port_of(str(job), attempt) for job in (100, 101, 102) for attempt in (1, 2, 3)}
    assert len(ports) == 9
    assert ports <= set(PORTS)


def test_a_node_says_what_it_alone_knows():
    environ = {"SLURM_NODEID": "1", "SLURMD_NODENAME": "n2"}
    assert torchrun_options("/log", environ) == [
        *("--log-dir", "/log/node-1", "--rdzv-conf", "is_host=false", "--local-addr", "n2"),
    ]
    assert torchrun_options("/log", {**environ, "SLURM_NODEID": "0"})[3] == "is_host=true"
    assert threads_per_rank({"TRICHORD_RANKS_PER_NODE": "8"}, 96) == "12"
    assert threads_per_rank({"TRICHORD_RANKS_PER_NODE": "8", "OMP_NUM_THREADS": "1"}, 96) == "1"


def test_a_rank_is_told_what_torchrun_would_tell_it():
    environ = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_NODEID": "1"}
    assert rank_variables({**environ, "TRICHORD_RANKS_PER_NODE": "8"}) == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "GROUP_RANK": "1",
    }


def test_a_job_survives_its_file(tmp_path):
    path = tmp_path / "job.json"
    path.write_text(replace(JOB, budget=Budget(1, 2, 3)).to_json())
    assert read_job(path) == replace(JOB, budget=Budget(1, 2, 3))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"check": {}, "budget": {}, "colour": 1}'])
def test_a_file_that_is_no_job_is_told(tmp_path, text):
    path = tmp_path / "job.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="submit the run again"):
        read_job(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_job(tmp_path / "none.json")
