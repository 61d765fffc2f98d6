"""The rendered torchrun command and environment, word for word."""

from pathlib import Path

import pytest

from trichord.core.errors import ConfigError
from trichord_launch.command import LocalJob, render
from trichord_launch.machine import Machine, count_gpus, require_fit

JOB = LocalJob(
    run_folder=Path("/data/runs/digits"),
    run_name="digits",
    config="configs/runs/quickstart.yaml",
    overrides=("engine.lr=3e-4", "run.root=/data/my runs"),
    procs=2,
    attempt=3,
    stop_timeout_s=630.5,
)
CPU = Machine(cores=8, gpus=0)

GOLDEN = """\
OMP_NUM_THREADS=4 \\
  TORCH_EXTENSIONS_DIR=/data/runs/digits/torch_extensions \\
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT=631 \\
  GLOO_SOCKET_IFNAME=lo \\
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 \\
  HF_HUB_OFFLINE=1 \\
  PYTHONUNBUFFERED=1 \\
  DS_ACCELERATOR=cpu \\
  PATH=/venv/bin:/usr/bin \\
  TRICHORD_ATTEMPT=3 \\
  /venv/bin/python -m trichord_launch.torchrun \\
  --nnodes 1 \\
  --nproc-per-node 2 \\
  --rdzv-backend c10d \\
  --rdzv-endpoint 127.0.0.1:0 \\
  --rdzv-id digits-3 \\
  --local-addr 127.0.0.1 \\
  --max-restarts 0 \\
  --log-dir /data/runs/digits/attempts/3/torchrun \\
  --tee 3 -m trichord.cli train configs/runs/quickstart.yaml engine.lr=3e-4 'run.root=/data/my runs'"""


def command(job=JOB, machine=CPU, environ=None):
    return render(job, machine, environ or {"PATH": "/usr/bin"}, python="/venv/bin/python")


def test_the_whole_command_is_as_agreed():
    assert command().as_shell() == GOLDEN


def test_what_the_user_has_set_stays():
    environ = {"PATH": "/venv/bin:/usr/bin", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    added = command(environ=environ).environment
    assert not set(environ) & set(added)
    assert command(environ={**environ, "TRICHORD_ATTEMPT": "9"}).environment["TRICHORD_ATTEMPT"] == "3"


def test_with_gpus_deepspeed_chooses_for_itself():
    assert "DS_ACCELERATOR" not in command(machine=Machine(cores=8, gpus=2)).environment


def test_more_ranks_than_cores_still_get_a_thread():
    assert command(machine=Machine(cores=1, gpus=0)).environment["OMP_NUM_THREADS"] == "1"


def test_on_a_terminal_rank_0_keeps_it():
    def tee(procs):
        from dataclasses import replace

        argv = command(replace(JOB, procs=procs, interactive=True)).argv
        return argv[argv.index("--tee") + 1] if "--tee" in argv else None

    assert (tee(1), tee(2), tee(3)) == (None, "1:3", "1:3,2:3")


@pytest.mark.parametrize(
    ("environ", "files", "gpus"),
    [
        ({}, [], 0),
        ({}, ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], 2),
        ({}, ["kfd", "dri/renderD128", "dri/renderD129", "dri/card0"], 2),
        ({"CUDA_VISIBLE_DEVICES": "3"}, ["nvidia0", "nvidia3"], 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], 0),
        ({"DS_ACCELERATOR": "cpu"}, ["nvidia0"], 0),
    ],
)
def test_gpus_are_counted_without_torch(tmp_path, environ, files, gpus):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert count_gpus({"PATH": "", **environ}, devices=tmp_path) == gpus


def test_nvidia_smi_is_asked_where_there_is_no_device_file(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: X (UUID: a)'\necho 'GPU 1: X (UUID: b)'\n")
    tool.chmod(0o755)
    assert count_gpus({"PATH": f"{tmp_path}"}, devices=tmp_path) == 2


def test_more_processes_than_gpus_are_refused():
    require_fit(4, Machine(cores=2, gpus=0))
    require_fit(4, Machine(cores=2, gpus=4))
    with pytest.raises(ConfigError, match=r"--procs 4 needs 4 GPUs, this machine has 2"):
        require_fit(4, Machine(cores=8, gpus=2))
