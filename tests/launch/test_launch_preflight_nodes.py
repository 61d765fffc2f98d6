"""What nodes say of themselves and of each other becomes findings; and this machine looked at as a node, for real."""

import json
import os
import socket
from itertools import combinations

import pytest
from preflight_world import Ready, failed, guide_commands
from typer.testing import CliRunner

from trichord.benchmarks.links import rounds
from trichord_launch.cli import app
from trichord_launch.job import NodeCheck
from trichord_launch.node_problems import Asked
from trichord_launch.preflight import slurm_nodes
from trichord_launch.preflight.node_findings import REMEDIES, links_findings, node_findings
from trichord_launch.preflight.port import check_port

ASKED = Asked(100.0, 110.0, max_skew_s=5.0)


@pytest.fixture
def ready(tmp_path):
    return Ready(tmp_path)


def report(*problems, time=105.0, **versions):
    told = [{"kind": kind, "text": text} for kind, text in problems]
    return {"problems": told, "versions": {"torch": "2.14", "commit": "abc", **versions}, "time": time}


def test_each_kind_of_problem_names_its_nodes_and_its_remedy():
    reports = {
        "n1": report(),
        "n2": report(("devices", "1 of 2 GPUs"), ("disk", "0.1 GiB free in /tmp, 1 wanted")),
        "n3": report(torch="2.13"),
        "n4": report(time=90.0),
        "n5": None,
        "n6": report(("devices", "0 of 2 GPUs"), commit="def"),
    }
    found = {finding.check: finding for finding in node_findings(reports, ASKED, NodeCheck(see=("/a", "/b")), 2)}
    assert found["nodes"].detail == "n1: 2 GPUs each; space, versions, clock, run folder, 2 paths of the run"
    assert found["nodes: devices"].detail == "n2: 1 of 2 GPUs; n6: 0 of 2 GPUs"
    assert "`sbatch: [--exclude=n2,n6]`" in found["nodes: devices"].remedy
    assert found["nodes: versions"].detail == "n3: torch 2.13, on most nodes 2.14; n6: commit def, on most nodes abc"
    assert "install the same on n3,n6" in found["nodes: versions"].remedy
    assert found["nodes: clock"].detail == "n4: its clock is at least 10.0 s behind, 5 are allowed"
    assert found["nodes: answer"].detail == "n5: it did not answer"
    assert all(finding.remedy for finding in found.values() if finding.verdict == "fail")
    assert len(found) == 6


def test_every_problem_a_node_can_report_has_a_remedy():
    from pathlib import Path

    import trichord_launch.node_check as own

    source = Path(own.__file__).read_text() + Path(own.__file__).with_name("node_problems.py").read_text()
    kinds = {part.split('"')[0] for part in source.split('Problem("')[1:]} | {"disk", "shm"}
    assert kinds == set(REMEDIES)


def links(pairs=None, **more):
    ranks = [{"node": node, "cuda_devices": 2} for node in ("n1", "n2") for _ in range(2)]
    pairs = [{"nodes": list(nodes), "gb_per_s": rate} for nodes, rate in (pairs or {("n1", "n2"): 20.0}).items()]
    reduced = {"right": True, "gb_per_s": 30.0, "bytes": 8}
    told = {"backend": "nccl", "ranks": ranks, "all_reduce": reduced, "pairs": pairs, "clock_ahead_s": {"n1": 0.0}}
    return {**told, **more}


def found(facts, gpus=2, promised=None):
    return {finding.check: finding for finding in links_findings(facts, NodeCheck(), gpus, promised)}


def test_links_that_are_well():
    told = found(links(clock_ahead_s={"n1": 0.0, "n2": -0.25}), promised=25.0)
    assert {finding.verdict for finding in told.values()} == {"pass"}
    assert told["all-reduce"].detail == "4 ranks on 2 nodes over nccl, 30 GB/s"
    assert told["clocks"].detail.startswith("n2 is -0.25 s from n1")


def test_a_node_behind_a_bad_cable_is_named():
    rates = {pair: 2.0 if "n3" in pair else 20.0 for pair in combinations(("n1", "n2", "n3", "n4", "n5"), 2)}
    told = found(links(rates))["pairs of nodes"]
    assert told.verdict == "warn"
    assert told.detail.startswith("4 of 10 slower than 10 GB/s")
    assert "cables of n3" in told.remedy
    assert found(links(), promised=50.0)["pairs of nodes"].verdict == "warn", "all alike, and slower than promised"
    assert found(links(backend="gloo"), promised=50.0)["pairs of nodes"].verdict == "pass", "promised for GPUs"


def test_a_wrong_sum_blind_ranks_and_clocks_apart_fail():
    wrong = found(links(all_reduce={"right": False, "gb_per_s": 1.0, "bytes": 8}))
    assert wrong["all-reduce"].verdict == "fail"
    blind = found(links(ranks=[{"node": "n1", "cuda_devices": 0}, {"node": "n2", "cuda_devices": 2}]))
    assert blind["torch devices"].detail == "n1: torch sees fewer than 2 GPUs"
    apart = found(links(clock_ahead_s={"n1": 0.0, "n2": 7.0}))["clocks"]
    assert (apart.verdict, apart.remedy.split(" (")[0]) == ("fail", "synchronise the clock of n2")


@pytest.mark.parametrize("count", range(1, 10))
def test_every_pair_of_nodes_is_met_once_and_no_node_twice_in_a_round(count):
    nodes = [(8 * number, f"n{number}") for number in range(count)]
    played = list(rounds(nodes))
    for pairs in played:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    assert sorted(pair for pairs in played for pair in pairs) == list(combinations(nodes, 2))
    assert len(played) <= count


def test_the_launchers_own_ports_are_looked_at(monkeypatch):
    assert check_port(None, {}).verdict == "pass"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("trichord_launch.preflight.port.free_port", lambda first: port)
        assert check_port(None, {}).verdict == "fail"


def test_the_job_that_looks_at_nodes_is_shown_and_nothing_is_written(ready):
    words = ["preflight", str(ready.config), "--cluster", "example-512gpu", "--nodes-list", "a1,a2", "--port", "29500"]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, done.output
    for line in ("#SBATCH --nodes=2", "#SBATCH --nodelist=a1,a2", "#SBATCH --no-requeue", "#SBATCH --time=10"):
        assert f"{line}\n" in done.stdout
    assert "export HF_HUB_OFFLINE=1\n" in done.stdout
    assert "export MASTER_PORT=29500\n" in done.stdout
    assert "-m trichord_launch.preflight.allocation " in done.stdout
    assert not ready.run_folder.exists()


@pytest.mark.distributed
def test_this_machine_as_a_node(ready):
    code, findings = ready.preflight("--procs", 2)
    assert (code, failed(findings)) == (0, {})
    told = {finding["check"]: finding["detail"] for finding in findings}
    assert "2 paths of the run" in told["nodes"]
    assert told["all-reduce"].startswith("2 ranks on ")
    (record,) = (ready.run_folder / "preflight").iterdir()
    assert json.loads((record / "report.json").read_text())["links"]["all_reduce"]["right"] is True
    assert {"report.json", "links.json", "links.log", "token", "node_check"} <= set(os.listdir(record))


def test_every_command_of_the_guide_that_needs_no_slurm(ready, monkeypatch):
    """The one that asks nodes is run in tests/slurm; that with --procs as above, but with one rank."""
    monkeypatch.chdir(ready.folder)
    ready.config.rename("mine.yaml")
    (ready.folder / "mycluster.yaml").write_text("name: a\nnodes: 2\ngpus_per_node: 2\nslurm: {partition: gpu}\n")
    (ready.folder / "plan.json").write_text('{"run": "words", "gpus": 2, "checkpoint": {"bytes": 9}, "config": {}}')
    told = [words for words in guide_commands() if "--nodes" not in words and "--procs" not in words]
    assert len(told) == len(guide_commands()) - 2 == 4
    for program, *words in told:
        done = CliRunner().invoke(app, words)
        assert (program, done.exit_code) == ("trichord-launch", 0), f"{words}: {done.output}"


FAKE = {"sbatch": "echo 8", "squeue": "true", "scancel": 'echo "$@" > cancelled', "scontrol": "true"}


@pytest.fixture
def slurm(ready, monkeypatch):
    """A Slurm that takes jobs and does nothing with them."""
    for name, line in FAKE.items():
        tool = ready.folder / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{line}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ready.folder}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(ready.folder)
    monkeypatch.setattr(slurm_nodes, "_GRACE_S", 0.1)
    return ("--nodes", 2, "--cluster", "example-512gpu")


def test_a_job_that_ends_without_a_word_is_a_failed_line(ready, slurm):
    code, findings = ready.preflight(*slurm)
    assert code == 69
    assert failed(findings)["nodes"]["detail"].startswith("job 8 ended without a word")


def test_interrupted_waiting_cancels_the_job(ready, slurm, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm_nodes.scheduler, "queue", interrupted)
    words = ["preflight", str(ready.config), *map(str, slurm)]
    assert CliRunner().invoke(app, words).exit_code != 0
    assert (ready.folder / "cancelled").read_text() == "8\n"


def test_without_slurm_nodes_are_a_failed_line(ready, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, findings = ready.preflight("--nodes", 2, "--cluster", "example-512gpu")
    assert code == 2
    assert "sbatch is not on this machine" in failed(findings)["nodes"]["detail"]


def test_a_node_that_is_not_fit_starts_no_ranks(ready):
    cluster = ready.folder / "here.yaml"
    cluster.write_text("name: here\nnodes: 1\ngpus_per_node: 2\nnode_check: {min_shm_free_gib: 1e9}\n")
    code, findings = ready.preflight("--procs", 2, "--cluster", cluster)
    assert code == 69
    assert "1e+09 wanted" in failed(findings)["nodes: shm"]["detail"]
    assert findings[-1]["detail"] == "not before the node is fit"
