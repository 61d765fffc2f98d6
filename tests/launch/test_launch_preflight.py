"""Faults planted on a login node: each is found by the command a user runs, with its exit code and its remedy."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from preflight_world import Ready, failed, write_shard
from test_launch_cli import BLOCK

from trichord.core.errors import ConfigError
from trichord_launch.preflight.plan_file import read_plan
from trichord_launch.preflight.plan_findings import check_plan, usable_plan
from trichord_launch.preflight.request import Request, load


@pytest.fixture
def ready(tmp_path):
    return Ready(tmp_path)


def test_a_run_that_is_ready(ready):
    code, findings = ready.preflight()
    assert (code, failed(findings)) == (0, {})
    told = {finding["check"]: finding["detail"] for finding in findings}
    assert list(told) == [
        *("config", "run folder", "checkpoint", "shards words", "sidecars words", "contents words", "samples"),
        *("batches.tokenizer", "disk", "wandb", "port"),
    ]
    assert "all 3 are there" in told["shards words"]
    assert "current for all 3" in told["sidecars words"]
    assert "3 opened" in told["contents words"]
    assert "15; the run is about this many epochs: words 2.1 (ESTIMATE" in told["samples"]  # 20 rows of 1.6
    assert not ready.run_folder.exists(), "nothing stays on a login node"


def test_ranks_that_do_not_fit_the_run_are_found(ready):
    planned = plan(ready, 1, gpus=6)
    heads = "fusion.trunk.num_heads=4", "fusion.trunk.num_kv_heads=4"
    code, findings = ready.preflight("engine.sequence_parallel=4", *heads, "--plan", planned)
    found = failed(findings)["ranks"]
    assert (code, found["detail"]) == (2, "words: engine.sequence_parallel 4 does not divide the 6 ranks of this job")
    assert found["remedy"] == "start 4 or 8 ranks, or set it to a divisor of the ranks"
    code, findings = ready.preflight("engine.sequence_parallel=2", "--plan", planned)
    (warned,) = [finding for finding in findings if finding["check"] == "ranks"]
    assert (code, warned["verdict"]) == (0, "warn")
    assert warned["detail"].endswith("so 2 of 6 ranks would idle")
    assert warned["remedy"] == "take fewer ranks, or more rows per step"


def test_all_of_it_runs_without_torch(ready):
    words = ["preflight", str(ready.config), "--json"]
    done = subprocess.run([sys.executable, "-c", BLOCK, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert failed(json.loads(done.stdout)["findings"]) == {}


def test_the_table_is_for_people(ready):
    shutil.rmtree(ready.folder / "tokenizer")
    done = ready.command()
    assert done.returncode == 2
    assert "batches.tokenizer" in done.stdout
    assert "-> correct the path, or copy it there" in done.stdout
    assert "NOT ready: 1 failed" in done.stdout


def test_an_unwritable_folder_is_found(ready):
    if os.geteuid() == 0:  # root may write anywhere but here
        code, findings = ready.preflight("run.root=/proc/runs")
    else:
        (ready.folder / "closed").mkdir(mode=0o555)
        code, findings = ready.preflight(f"run.root={ready.folder}/closed/runs")
    assert code == 2
    assert "cannot be written" in failed(findings)["run folder"]["detail"]
    assert "run.root" in failed(findings)["run folder"]["remedy"]


def test_a_missing_shard_is_found(ready):
    ready.shards[1].unlink()
    named = f"shards.sources.words.shards={ready.folder}/data/words-{{0..2}}.tar"
    code, findings = ready.preflight(named)
    assert code == 3
    found = failed(findings)["shards words"]
    assert "1 of 3 shards" in found["detail"]
    assert "words-1.tar" in found["detail"]
    assert "copy the missing shards" in found["remedy"]
    assert [f["verdict"] for f in findings if f["check"] == "samples"] == ["skip"]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_truncated_shard_is_found(ready, indexed):
    """By the size in its sidecar, and where there is none, by walking over it."""
    shard = ready.shards[1]
    if not indexed:
        shard.with_suffix(".len").unlink()
    with open(shard, "rb+") as file:
        file.truncate(2600)
    code, findings = ready.preflight()
    assert code == 3
    found = failed(findings)["contents words"]
    assert "truncated" in found["detail"]
    assert str(shard) in found["detail"]
    assert ("has 2600 bytes, its sidecar was made for 10240" in found["detail"]) is indexed
    assert "copy them again" in found["remedy"]


def test_a_shard_that_was_truncated_when_it_was_indexed_is_found(ready):
    from trichord.shards.index import build_index

    with open(ready.shards[0], "rb+") as file:
        file.truncate(2600)
    build_index(str(ready.shards[0]))
    code, findings = ready.preflight()
    assert code == 3
    assert "words-0.tar" in failed(findings)["contents words"]["detail"]


def test_stale_and_missing_sidecars_are_warned_of(ready):
    write_shard(ready.shards[0], samples=9)
    ready.shards[1].with_suffix(".len").unlink()
    code, findings = ready.preflight()
    assert code == 0
    found = next(finding for finding in findings if finding["check"] == "sidecars words")
    assert (found["verdict"], found["detail"]) == ("warn", "of 3 shards 1 without, 1 with stale ones")
    assert found["remedy"].startswith(f'trichord data index "{ready.folder}/data/words-*.tar"')
    told = next(finding for finding in findings if finding["check"] == "samples")["detail"]
    assert told.startswith("about 1"), "two of three are not counted, but walked over"
    _, findings = ready.preflight("shards.sources.words.fields={text: [txt, label]}")
    found = next(finding for finding in findings if finding["check"] == "sidecars words")
    assert found["remedy"].startswith("trichord data index CONFIG [overrides]")


def test_too_few_samples_are_found(ready):
    """15 samples, 4 epochs, 2 rows a step: at most 30 steps, after which the run ends by itself."""
    assert ready.preflight("run.max_steps=30")[0] == 0
    code, findings = ready.preflight("run.max_steps=31")
    assert code == 0
    found = next(finding for finding in findings if finding["check"] == "samples")
    assert found["verdict"] == "warn"
    assert "60 samples over their epochs" in found["detail"]
    assert "the run ends when they are used up" in found["detail"]
    assert "leave run.max_steps out" in found["remedy"]


def test_a_source_without_samples_is_found(ready):
    for shard in ready.shards:
        write_shard(shard, samples=0)
    code, findings = ready.preflight()
    assert code == 3
    assert "words: no sample in any shard" in failed(findings)["samples"]["detail"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batches.tokenizer", "Qwen/Qwen3-0.6B@main"),
        ("fusion.trunk.weights", "Qwen/Qwen3-0.6B@c1899de289a04d12100db370d81485cdf75e47ca"),
        ("run.init_from", "someone/export#trunk"),
    ],
)
def test_a_backbone_that_was_not_fetched_is_found(ready, key, value):
    code, findings = ready.preflight(f"{key}={value}", HF_HUB_CACHE=str(ready.folder / "hub"))
    assert code == 2
    found = failed(findings)[key]
    assert "is not in the hub's cache" in found["detail"]
    assert found["remedy"] == f"trichord-launch preflight {ready.config} --fetch, where there is internet"


def plan(ready, size: int, **more):
    path = ready.folder / "plan.json"
    facts = {"format": 1, "run": "words", "gpus": 4, "checkpoint": {"bytes": size}, "config": {}, **more}
    path.write_text(json.dumps(facts))
    return path


def test_a_disk_too_small_for_the_plan_is_found(ready):
    assert ready.preflight("--plan", plan(ready, 10**6))[0] == 0
    code, findings = ready.preflight("--plan", plan(ready, 2**60))
    assert code == 69
    found = failed(findings)["disk"]
    assert "4 checkpoints of 1,048,576.00 TiB (PREDICTION of plan.json)" in found["detail"]
    assert "too little" in found["detail"]
    assert "checkpoints.keep_last" in found["remedy"]


def test_a_full_disk_is_found(ready):
    """A file system of its own, full but for a megabyte."""
    small = ready.folder / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=3m tmpfs {small} && head -c 2m /dev/zero > {small}/data && "
    inside = f"{sys.executable} -m trichord_launch.cli preflight {ready.config} run.root={small} --json --plan "
    command = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"]), "bash", "-c"]
    done = subprocess.run([*command, mount + inside + str(plan(ready, 400_000))], capture_output=True, timeout=60)
    if b"unshare" in done.stderr or b"mount" in done.stderr:
        pytest.skip(f"needs a mount namespace: {done.stderr.decode().strip()}")
    assert done.returncode == 69, done.stderr
    found = failed(json.loads(done.stdout)["findings"])["disk"]
    assert f"1.00 MiB free in {small}" in found["detail"]
    assert "538.50 KiB too little" in found["detail"]


def test_checkpoints_that_are_there_take_room_already(ready):
    ready.checkpoint()
    _, findings = ready.preflight()
    found = next(finding for finding in findings if finding["check"] == "disk")
    assert found["verdict"] == "pass"
    assert "(as step-000005)" in found["detail"]


def test_all_checkpoints_that_will_be_kept_take_room(ready):
    """The last 3 and the one being written; 4 that stay for good; the best 2."""
    keep = ("checkpoints.keep_every_steps=5", "run.max_steps=20", "checkpoints.keep_best.metric=train/loss")
    _, findings = ready.preflight("--plan", plan(ready, 10), *keep, "checkpoints.keep_best.count=2")
    told = next(finding for finding in findings if finding["check"] == "disk")["detail"]
    assert "10 checkpoints of 10 B (PREDICTION of plan.json)" in told


def test_a_clashing_port_is_found(ready):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, environment in ((("--port", port), {}), ((), {"MASTER_PORT": str(port)})):
            code, findings = ready.preflight(*words, **environment)
            assert code == 69
            found = failed(findings)["port"]
            assert f"{port} is in use" in found["detail"]
            assert f"by process {os.getpid()} (" in found["detail"]
            assert "--port" in found["remedy"]
    assert ready.preflight("--port", port)[0] == 0


def test_an_incompatible_checkpoint_is_found(ready):
    ready.checkpoint(run__seed=7)
    code, findings = ready.preflight()
    assert code == 4
    found = failed(findings)["checkpoint"]
    assert "run.seed: 7 in the run, 0 now" in found["detail"]
    assert "another run.name" in found["remedy"]
    assert ready.preflight("run.seed=7")[0] == 0


def test_a_checkpoint_of_this_config_is_gone_on_from(ready):
    folder = ready.checkpoint()
    told = next(f for f in ready.preflight()[1] if f["check"] == "checkpoint")["detail"]
    assert told == "goes on from step-000005, written by 2 ranks; any number reads it"
    newer = ready.checkpoint(step=8)
    (newer / "index.json").unlink()
    found = [f for f in ready.preflight()[1] if f["check"] == "checkpoint"]
    assert [f["verdict"] for f in found] == ["warn", "pass"]
    assert "step-000008 is not complete" in found[0]["detail"]
    (folder / "manifest.json").unlink()
    code, findings = ready.preflight()
    assert code == 4
    assert "none of 2 checkpoints is complete" in failed(findings)["checkpoint"]["detail"]


def test_a_checkpoint_of_another_format_or_config_of_its_own_is_found(ready):
    """The run's config is the same: what the checkpoint itself holds is looked at."""
    folder = ready.checkpoint()
    index = folder / "index.json"
    was = index.read_text()
    index.write_text(was.replace('"format": 1', '"format": 9'))
    code, findings = ready.preflight()
    assert code == 4
    assert "format 9" in failed(findings)["checkpoint"]["detail"]
    index.write_text(was)
    state = folder / "train_state.json"
    state.write_text(state.read_text().replace('"hidden_size": 16', '"hidden_size": 32'))
    code, findings = ready.preflight()
    assert code == 4
    assert "fusion.trunk.hidden_size: 32 in the run, 16 now" in failed(findings)["checkpoint"]["detail"]


def test_of_several_faults_the_config_decides_the_exit_code(ready):
    ready.shards[0].write_bytes(ready.shards[0].read_bytes()[:2600])
    assert ready.preflight("--plan", plan(ready, 2**60))[0] == 3
    assert ready.preflight("--plan", plan(ready, 2**60), "batches.tokenizer=nowhere")[0] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine.lrr=1"], "lrr"),
        (["--plan", "none.json"], "--plan none.json: no such file"),
        (["--nodes", "2"], "--nodes and --nodes-list look at nodes of a Slurm cluster"),
        (["--nodes", "2", "--cluster", "example-512gpu", "--procs", "2"], "give one of them"),
        (["--nodes", "65", "--cluster", "example-512gpu"], "--nodes must be 1 to 64"),
        (["--nodes", "2", "--cluster", "example-512gpu", "--time", "soon"], "--time: expected minutes"),
        (["--nodes-list", "n1,n 2", "--cluster", "example-512gpu"], "is no name of a node"),
        (["--port", "70000"], "--port must be 1 to 65535"),
    ],
)
def test_mistakes_are_findings_too(ready, words, said):
    code, findings = ready.preflight(*words)
    assert code == 2
    assert said in failed(findings)["config"]["detail"] + failed(findings)["config"]["remedy"]


def told_of_plan(ready, *words) -> tuple[int, dict, str]:
    """(exit code, what is said of the plan, how the size of a checkpoint is known)."""
    code, findings = ready.preflight(*words)
    found = {finding["check"]: finding for finding in findings}
    return code, found["plan"], found["disk"]["detail"]


def test_a_plan_of_another_run_or_config_is_told_and_its_figures_are_not_used(ready):
    huge = {"memory": {"device_bytes": 2**60}}
    keys = {"fusion.trunk.hidden_size": 16, "engine.zero_stage": 1, "fusion.trunk.num_layers": 1}
    for more, said in (
        ({"run": "other", "config": keys}, "is of run 'other' on 4 GPUs"),
        ({"config": {**keys, "fusion.trunk.num_layers": 9}}, "(fusion.trunk.num_layers: 9 in the plan, 1 now)"),
        ({"config": {**keys, "encoders.vision.name": "x"}}, "(encoders.vision: set in the plan, not set now)"),
        ({"config": {**keys, "fusion.trunk": None}}, "(fusion.trunk: not set in the plan, set now)"),
        ({"config": None}, "does not say of which config it is (an older version made it)"),
    ):  # fmt: skip
        path = plan(ready, 2**60, **huge, **more)
        if more["config"] is None:
            path.write_text(path.read_text().replace(', "config": null', ""))
        code, told, disk = told_of_plan(ready, "--plan", path, "--cluster", "example-8gpu")
        assert (code, told["verdict"]) == (0, "warn"), told
        assert said in told["detail"]
        assert told["detail"].endswith("its figures are not used")
        assert told["remedy"] == f"trichord plan {ready.config} --gpus 4 --save plan.json"
        assert "(LOWER BOUND from the config)" in disk
    path = plan(ready, 10**6, config=keys)
    code, told, disk = told_of_plan(ready, "--plan", path)
    assert told == {**told, "verdict": "pass", "detail": "plan.json, of this run and config on 4 GPUs"}
    assert "(PREDICTION of plan.json)" in disk
    code, told, disk = told_of_plan(ready, "fusion.trunk.hidden_size=512", "engine.zero_stage=2", "--plan", path)
    said = "(fusion.trunk.hidden_size: 16 in the plan, 512 now; engine.zero_stage: 1 in the plan, 2 now)"
    assert said in told["detail"]
    changed = "fusion.trunk.hidden_size=512 engine.zero_stage=2"
    assert told["remedy"] == f"trichord plan {ready.config} {changed} --gpus 4 --save plan.json"
    assert "LOWER BOUND" in disk


def test_a_plan_holds_for_the_layout_of_its_own_overlay_too(ready):
    keys = {"engine.zero_stage": 1, "batches.micro_rows": 1}
    best = {"overlay": {"engine": {"zero_stage": 2}}, "best": {"device_bytes": 3 * 2**30}}
    path = plan(ready, 10, memory={"device_bytes": 100 * 2**30}, config=keys, **best)
    overlay = ready.folder / "plan.overlay.yaml"
    overlay.write_text("engine: {zero_stage: 2}\n")
    code, told, _ = told_of_plan(ready, overlay, "batches.micro_rows=1", "--plan", path, "--cluster", "example-8gpu")
    assert (code, told["verdict"]) == (0, "pass"), told
    assert told["detail"].startswith("a rank needs 3.0 GiB (PREDICTION)")
    for broken in ({"overlay": {"engine": 3}}, {"overlay": []}, {"best": 3}, {"best": {"device_bytes": "x"}}):
        path = plan(ready, 10, memory={"device_bytes": 5}, config=keys, **{**best, **broken})
        told_of_plan(ready, "--plan", path)


def test_a_plan_for_larger_gpus_or_another_number_of_them_is_told(ready):
    large = plan(ready, 10, memory={"device_bytes": 100 * 2**30})
    code, findings = ready.preflight("--plan", large, "--cluster", "example-8gpu")
    assert code == 2
    assert "a rank needs 100.0 GiB (PREDICTION)" in failed(findings)["plan"]["detail"]
    assert "zero_stage" in failed(findings)["plan"]["remedy"]
    request = Request(str(ready.config), plan=str(large), procs=1)
    assert check_plan(load(request))[0].detail.endswith("on 4 GPUs, not 1: its memory of a rank is not used")
    usable = usable_plan(load(request))
    assert (usable.checkpoint_bytes, usable.device_bytes) == (10, None), "a checkpoint is as large on any number"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a plan: a list and no mapping"),
        ('{"sources": []}', "not a plan: it has no checkpoint"),
        ('{"checkpoint": {"bytes": 1}}', "not a plan: it does not say of which run"),
        ('{"run": "a", "gpus": 1, "checkpoint": {"bytes": "1"}}', "not a plan: sizes that are no numbers"),
        ('{"format": 9}', "plan format 9, this version reads 1"),
    ],
)
def test_a_file_that_is_no_plan_is_told_in_words(ready, text, said):
    path = ready.folder / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        read_plan(path)
    assert str(raised.value).endswith("make it again: trichord plan CONFIG --gpus N --save plan.json")
    assert "Error" not in str(raised.value), "no names of Python's exceptions"


def test_wandb_says_what_it_will_do(ready, monkeypatch):
    def told(mode, **environment):
        clean = {"WANDB_MODE": "", "WANDB_API_KEY": "", "NETRC": "/nowhere", "https_proxy": "", "HTTPS_PROXY": ""}
        _, findings = ready.preflight(f"tracking.wandb.mode={mode}", **{**clean, **environment})
        found = next(finding for finding in findings if finding["check"] == "wandb")
        return found["verdict"], found["detail"]

    assert told("auto")[0] == "pass"
    assert told("auto")[1].startswith("offline")
    assert told("online")[0] == "warn"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        at = {"WANDB_API_KEY": "x", "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        assert told("online", **at) == ("pass", f"127.0.0.1:{server.getsockname()[1]} answers")
    assert told("online", **at)[0] == "warn"
    assert "cannot be reached" in told("online", **at)[1]
