"""Preflight on the nodes of a real Slurm: a fault of one node is named with it; sound nodes are measured together."""

import json
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from importlib.metadata import distribution
from pathlib import Path

import pytest
from slurm_world import HERE, wait_for

sys.path.insert(0, str(HERE.parent / "launch"))
from preflight_world import Ready, failed, guide_commands

PORT = 29511
CLUSTER = """\
name: mini
nodes: 3
gpus_per_node: 2
gpu: {name: fake, memory_gib: 80, bf16_tflops: 1}
env: {DS_ACCELERATOR: "", TMPDIR: FOLDER/scratch}
setup: ["export PATH=FOLDER/tools:$PATH"]
node_check: {min_disk_free_gib: 0.01, min_shm_free_gib: 0.01, timeout_s: 30}
slurm: {partition: low, cpus_per_task: 2, save_lead_s: 50}
"""
NVIDIA_SMI = """\
#!/bin/sh
case "$1" in
  -L) for i in GPUS; do echo "GPU $i: fake"; done ;;
  *) for i in GPUS; do echo 81920; done ;;
esac
"""
LISTEN = """
import pathlib, socket, sys, time
with socket.create_server(("", int(sys.argv[1]))):
    pathlib.Path(sys.argv[2]).touch()
    while not pathlib.Path(sys.argv[3]).exists() and time.sleep(0.1) is None: pass
"""


@pytest.fixture
def ready(world):
    ready = Ready(world.folder / "ready")
    ready.cluster = ready.folder / "mini.yaml"
    for name in ("tools", "scratch"):
        (ready.folder / name).mkdir()
    ready.cluster.write_text(CLUSTER.replace("FOLDER", str(ready.folder)))
    write_tool(ready.folder / "tools" / "nvidia-smi", "0 1")
    return ready


def write_tool(path: Path, gpus: str) -> None:
    path.write_text(NVIDIA_SMI.replace("GPUS", gpus))
    path.chmod(0o755)


def preflight(world, ready, *words) -> tuple[int, list[dict], dict]:
    """(exit code, findings, links) of the command on the login node, in the run's folder."""
    command = ["bash", str(HERE / "mini_cluster.sh"), "run", sys.executable, "-m", "trichord_launch.cli", "preflight"]
    command += [*map(str, words), "--json"]
    environment = world.cluster.environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, cwd=ready.folder)
    assert done.stdout, f"{done.stderr}\n{world.cluster.tell()}"
    told = json.loads(done.stdout)
    return done.returncode, told["findings"], told["links"]


@contextmanager
def mounted(world, node: str, *words):
    """A mount that this node alone sees; the last word is where."""
    world.cluster.script("node", node, "mount", *map(str, words))
    try:
        yield
    finally:
        world.cluster.script("node", node, "umount", str(words[-1]))


@contextmanager
def listening(world, folder: Path, node: str, port: int):
    """Somebody else at a port of that node."""
    began, end = folder / "listening", folder / "leave"
    command = ["bash", str(HERE / "mini_cluster.sh"), "node", node, sys.executable, "-c", LISTEN]
    process = subprocess.Popen([*command, str(port), str(began), str(end)], env=world.cluster.environment)
    try:
        wait_for(began.exists, 30, "the listener")
        yield
    finally:
        end.touch()
        process.wait(timeout=20)


def test_faults_of_single_nodes_are_found_and_named(world, ready):
    """n1: a full disk, and the port taken. n2: another version. n3: a device missing, and a shard not there."""
    other, bad_tool, nothing = ready.folder / "METADATA", ready.folder / "one-gpu", ready.folder / "nothing"
    own = Path(str(distribution("deepspeed").locate_file(f"deepspeed-{distribution('deepspeed').version}.dist-info")))
    other.write_text((own / "METADATA").read_text().replace(distribution("deepspeed").version, "0.1.2"))
    write_tool(bad_tool, "0")
    nothing.mkdir()
    with ExitStack() as planted:
        for node, words in (
            ("n1", ("-t", "tmpfs", "-o", "size=1m", "tmpfs", ready.folder / "scratch")),
            ("n2", ("--bind", other, own / "METADATA")),
            ("n3", ("--bind", bad_tool, ready.folder / "tools" / "nvidia-smi")),
            ("n3", ("--bind", nothing, ready.folder / "data")),
        ):
            planted.enter_context(mounted(world, node, *words))
        planted.enter_context(listening(world, ready.folder, "n1", PORT))
        code, findings, links = preflight(
            world, ready, ready.config, "--cluster", ready.cluster, "--nodes", 3, "--port", PORT
        )
    found = failed(findings)
    assert code == 69
    assert set(found) == {"port", "nodes: disk", "nodes: versions", "nodes: devices", "nodes: see"}, findings
    assert f"{PORT} is in use on n1, by process" in found["port"]["detail"]
    assert found["nodes: disk"]["detail"].startswith("n1: ")
    assert f"free in {ready.folder}/scratch, 0.01 wanted" in found["nodes: disk"]["detail"]
    assert "TMPDIR" in found["nodes: disk"]["remedy"]
    version = distribution("deepspeed").version
    assert found["nodes: versions"]["detail"] == f"n2: deepspeed 0.1.2, on most nodes {version}"
    assert "install the same on n2" in found["nodes: versions"]["remedy"]
    assert found["nodes: devices"]["detail"] == "n3: 1 of 2 GPUs"
    assert "--exclude=n3" in found["nodes: devices"]["remedy"]
    assert found["nodes: see"]["detail"] == f"n3: {ready.shards[0]} is not there"
    assert (links, findings[-1]["detail"]) == ({}, "not before every node is fit")


def test_the_guides_command_measures_sound_nodes_together(world, ready):
    (words,) = [command[2:] for command in guide_commands() if "--nodes" in command]
    assert words == ["mine.yaml", "--cluster", "mycluster.yaml", "--nodes", "2"]
    ready.config.rename(ready.folder / "mine.yaml")
    cluster = ready.cluster.read_text().replace('DS_ACCELERATOR: ""', "DS_ACCELERATOR: cpu")
    (ready.folder / "mycluster.yaml").write_text(cluster.replace("gpus_per_node: 2", "gpus_per_node: 1"))
    code, findings, links = preflight(world, ready, *words)
    assert (code, failed(findings)) == (0, {}), f"{findings}\n{world.cluster.tell()}"
    told = {finding["check"]: finding["detail"] for finding in findings}
    assert told["port"].endswith("is free on n1; the launcher takes a free one for every start")
    assert told["nodes"].startswith("n1, n2: no GPUs asked for; space, versions, clock")
    assert told["all-reduce"].startswith("2 ranks on 2 nodes over gloo")
    assert [pair["nodes"] for pair in links["pairs"]] == [["n1", "n2"]]
    assert links["pairs"][0]["gb_per_s"] > 0
    assert links["all_reduce"]["right"] is True
    assert abs(links["clock_ahead_s"]["n2"]) < 1.0, "one machine, one clock"
    wait_for(lambda: not world.cluster.run("squeue", "-h").strip(), 20, "the job to leave", world.cluster.tell)
