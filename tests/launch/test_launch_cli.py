"""The launcher's verbs: quick, without torch, and every mistake in one message."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trichord.config.load import load_cluster
from trichord.core.errors import ConfigError, TrichordError
from trichord.core.status import Status, write_rank_status, write_status
from trichord_launch.cli import app
from trichord_launch.cluster_draft import read_partitions
from trichord_launch.follow import find_run, log_file, render_status, run_status, tail
from trichord_launch.verdict import Verdict

CONFIG = """\
run: {name: digits, root: ROOT, max_steps: 40}
shards: {sources: [{name: photos, shards: data/photos.tar}]}
batches: {tokenizer: data/tokenizer, rows_per_step: 4}
fusion: {kind: none}
encoders: {vision: {}, text: {}}
objectives: {contrastive: {pairs: [image-text]}}
checkpoints: {commit_timeout_s: 40}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "digits.yaml"
    path.write_text(CONFIG.replace("ROOT", str(tmp_path / "runs")))
    return str(path)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def console_script(*arguments):
    command = [sys.executable, "-m", "trichord_launch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_help_is_quick_and_without_torch():
    code = (
        "import sys, trichord_launch.cli as cli\n"
        "sys.argv = ['trichord-launch', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'trichord.config.run'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        before = cpu_seconds()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        seconds.append(cpu_seconds() - before)
        assert result.returncode == 0, result.stderr
        assert "local" in result.stdout
    assert min(seconds) < 0.3


def cpu_seconds():
    """Of the processes that have ended: what they take where nobody else wants the processor."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


BLOCK = """\
import sys
for name in ("torch", "numpy", "deepspeed", "transformers", "triton", "safetensors"): sys.modules[name] = None
from trichord_launch.cli import main
sys.argv = ["trichord-launch", *sys.argv[1:]]
main()
"""
FAKE_SLURM = """\
#!/bin/sh
case "$(basename "$0") $*" in
  squeue*) echo "7|RUNNING|None|n[1-2]|1:00|9:00|N/A|7" ;;
  sinfo*) echo "gpu|4|64|gpu:h100:8(S:0-1)|1-00:00:00|up" ;;
  sbatch*) echo 8 ;;
  *) echo "JobRequeue = 1" ;;
esac
"""


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """Slurm's commands, as far as a verb asks them something."""
    folder = tmp_path / "slurm-bin"
    folder.mkdir()
    for name in ("squeue", "sinfo", "sbatch", "scontrol", "scancel"):
        (folder / name).write_text(FAKE_SLURM)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def verbs_without_torch():
    return [
        (["local", "CONFIG", "--procs", "1", "--dry-run"], "trichord_launch.torchrun"),
        (["hosts", "CONFIG", "--hosts", "n1,n2", "--procs", "1"], "--rdzv-endpoint n1:"),
        (["slurm", "CONFIG", "--cluster", "CLUSTER"], "trichord_launch.batch"),
        (["slurm", "CONFIG", "--cluster", "CLUSTER", "--submit"], "8"),
        (["preflight", "CONFIG", "--cluster", "CLUSTER", "--nodes", "2", "--dry-run"], "preflight.allocation"),
        (["status", "RUN"], "job         7 running on n[1-2] for 1:00, 9:00 left"),
        (["logs", "RUN", "-n", "1"], "line 99"),
        (["logs", "RUN", "--job"], "job 7, start 1"),
        (["attach", "RUN", "--rank", "3", "--dry-run"], "srun --jobid=7 --overlap --nodes=1 --ntasks=1 --nodelist=n2"),
        (["cancel", "RUN"], "job 7 asked to save and stop"),
        (["cluster", "new", "mine"], "mine.yaml"),
    ]


@pytest.mark.parametrize(("arguments", "expected"), verbs_without_torch(), ids=lambda value: str(value)[:30])
def test_every_verb_runs_without_torch(config, cluster, run_folder, fake_slurm, arguments, expected):
    submission = run_folder / "submissions" / "1"
    submission.mkdir(parents=True)
    (submission / "links.json").write_text('{"job_ids": ["7"], "time": 1}')
    (submission / "7.log").write_text("job 7, start 1\n")
    (run_folder / "attempts/2/command.json").write_text('{"nodes": ["n1", "n2"], "ranks_per_node": 2}')
    places = {"CONFIG": config, "CLUSTER": str(cluster), "RUN": str(run_folder)}
    if "CONFIG" in arguments:  # of a run that is not there yet
        arguments = [*arguments, "run.name=other"]
    words = [places.get(word, word) for word in arguments]
    command = [sys.executable, "-c", BLOCK, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_a_run_in_the_queue_is_not_submitted_again(config, cluster, tmp_path, fake_slurm):
    submission = tmp_path / "runs" / "digits" / "submissions" / "1"
    submission.mkdir(parents=True)
    (submission / "links.json").write_text('{"job_ids": ["7"], "time": 1}')
    result = invoke("slurm", config, "--cluster", cluster, "--submit")
    assert "run digits is in the queue already, as job 7 (running)" in str(result.exception)


def test_a_drafted_cluster_says_what_sinfo_said(tmp_path, monkeypatch, fake_slurm):
    monkeypatch.chdir(tmp_path)
    assert invoke("cluster", "new", "mine").exit_code == 0
    cluster = load_cluster("mine.yaml")
    assert (cluster.nodes, cluster.gpus_per_node, cluster.slurm.cpus_per_task) == (4, 8, 8)
    assert (cluster.gpu.name, cluster.slurm.time_limit, cluster.slurm.partition) == (
        "H100 SXM 80GB",
        "1-00:00:00",
        "gpu",
    )
    assert "mine.yaml exists" in str(invoke("cluster", "new", "mine").exception)
    assert "no partition 'cpu' that is up; there are: gpu" in str(
        invoke("cluster", "new", "other", "--partition", "cpu").exception
    )


def test_sinfo_is_read():
    text = "a|2|32+|gpu:4|infinite|up\nb|1|8|(null)|1:00:00|up\nc|9|8|gpu:8|1:00:00|down\n"
    found = [(p.name, p.gpus, p.gpu_type, p.cpus) for p in read_partitions(text)]
    assert found == [("a", 4, "", 32), ("b", 0, "", 8)]


TRUNK = """\
fusion: {trunk: {family: llama, hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 4, num_kv_heads: 4}}
"""
CLUSTER = "name: small\nnodes: 2\ngpus_per_node: 2\nslurm: {partition: gpu}\n"


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(CLUSTER)
    return path


def test_slurm_shows_the_script_and_writes_nothing(config, cluster, tmp_path):
    result = invoke("slurm", config, "engine.lr=1e-3", "--cluster", cluster, "--nodes", 2, "--time", "30")
    assert result.exit_code == 0, result.output
    assert "#SBATCH --nodes=2" in result.stdout
    assert "#SBATCH --time=30" in result.stdout
    assert "2 x 2 = 4 ranks" in result.stderr
    assert "--submit" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_grid_is_shown_as_an_array(config, cluster, tmp_path):
    result = invoke("slurm", config, "--cluster", cluster, "--grid", "engine.lr=1e-3,3e-4", "--grid", "run.seed=1,2")
    assert "#SBATCH --array=0-3" in result.stdout
    assert f"digits-lr-3e-4-seed-2    {tmp_path}/runs/digits-lr-3e-4-seed-2" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", 3], "--nodes must be 1 to 2"),
        (["--time", "soon"], "--time: expected minutes"),
        (["--launcher", "mpi"], "expected torchrun or srun"),
        (["--links", 2], "requeues itself"),
        (["engine.lrr=1"], "lrr"),
        (["--grid", "engine.lrr=1,2"], "lrr"),
        (["--submit"], "sbatch is not on this machine"),
    ],
)
def test_mistakes_are_told_before_anything_is_submitted(config, cluster, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "/nowhere")
    result = invoke("slurm", config, "--cluster", cluster, *arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
    assert list(tmp_path.glob("runs/*/submissions/*")) == [], "nothing is left of what was not submitted"


def test_ranks_without_a_row_are_told(config, cluster):
    few = invoke("slurm", config, "batches.rows_per_step=3", "--cluster", cluster, "--nodes", 2)
    assert "rows_per_step 3, so 1 of 4 ranks would idle" in few.stderr
    assert "idle" not in invoke("slurm", config, "batches.rows_per_step=4", "--cluster", cluster, "--nodes", 2).stderr


def test_groups_that_do_not_divide_the_ranks_are_refused_before_anything_starts(config, cluster, tmp_path, cpu):
    text = Path(config).read_text().replace("fusion: {kind: none}", TRUNK)
    Path(config).write_text(text + "engine: {sequence_parallel: 4}\n")
    wrong = "digits: engine.sequence_parallel 4 does not divide the 6 ranks of this job; start 4 or 8 ranks"
    assert wrong in str(invoke("local", config, "--procs", 6, "--dry-run").exception)
    cluster.write_text(CLUSTER.replace("gpus_per_node: 2", "gpus_per_node: 3"))
    assert wrong in str(invoke("slurm", config, "--cluster", cluster, "--nodes", 2).exception)
    told = invoke("slurm", config, "engine.sequence_parallel=2", "--cluster", cluster, "--nodes", 2).stderr
    assert "sequence_parallel 2 does not divide the 3 ranks of a node" in told
    assert "idle" not in told, "4 rows for 3 groups"
    told = invoke("local", config, "--procs", 8, "batches.rows_per_step=1", "--dry-run").stderr
    assert told.startswith("warning: digits has batches.rows_per_step 1 for groups of 4 ranks")
    assert "so 4 of 8 ranks would idle" in told


def test_a_cluster_file_cannot_be_drafted_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    said = str(invoke("cluster", "new", "mine").exception)
    assert "sinfo is not on this machine" in said
    assert "on a login node, or begin with a copy of an example" in said


def test_a_cluster_without_a_scheduler_is_told(config, cluster):
    cluster.write_text(CLUSTER.replace("slurm: {partition: gpu}", ""))
    assert "has no slurm: section" in str(invoke("slurm", config, "--cluster", cluster).exception)


def test_a_dry_run_shows_the_command_and_writes_nothing(config, tmp_path, cpu):
    result = invoke("local", config, "--procs", 2, "engine.lr=1e-3", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "--nproc-per-node 2" in result.stdout
    assert f"train {config} engine.lr=1e-3" in result.stdout
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100" in result.stdout, "commit_timeout_s and a margin"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere.yaml"], ConfigError, "nowhere.yaml"),
        (["CONFIG", "engine.lrr=1"], ConfigError, "lrr"),
        (["CONFIG", "--procs", "0"], ConfigError, "--procs must be at least 1, got 0"),
    ],
)
def test_mistakes_are_found_before_anything_starts(config, tmp_path, cpu, arguments, error, message):
    result = invoke("local", *[config if argument == "CONFIG" else argument for argument in arguments])
    assert isinstance(result.exception, error)
    assert message in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_model_is_refused_before_anything_starts(config, tmp_path, cpu):
    from trichord.config.load import load_run_config, resolved_yaml

    folder = tmp_path / "runs" / "digits"
    (folder / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-000001" / "manifest.json").write_text("{}")
    (folder / "config.yaml").write_text(resolved_yaml(load_run_config(config, ["run.seed=7"])))
    for arguments in ((), ("--dry-run",), ("--procs", "2", "--max-restarts", "3")):
        result = console_script("local", config, *arguments)
        assert result.returncode == 4, result.stderr
        assert result.stderr.startswith("error: run 'digits' cannot go on with this config")
        assert result.stderr.count("run.seed: 7 in the run, 0 now") == 1
        assert "Traceback" not in result.stderr
    assert not (folder / "attempts").exists()


def test_the_console_script_ends_in_one_message_and_the_code():
    result = console_script("local", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: nowhere.yaml")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("outcome", "code", "said"), [("finished", 0, 1), ("stopped", 75, 1), ("failed", 4, 0)])
def test_the_verdict_is_said_once(config, cpu, monkeypatch, outcome, code, said):
    """Of a failed attempt the supervisor has said why, and why it is the last."""
    verdict = Verdict(outcome, code, 7, "because of this")
    monkeypatch.setattr("trichord_launch.local.supervise", lambda *_args, **_options: verdict)
    result = invoke("local", config)
    assert result.exit_code == code
    assert result.output.count(f"{outcome} at step 7: because of this") == said


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "digits"
    for name in ("logs", "attempts/1", "attempts/2", "checkpoints/step-000020", "checkpoints/step-000030"):
        (folder / name).mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {max_steps: 40}\n")
    (folder / "checkpoints/step-000020/manifest.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"step": 25, "time": 100.0, "train/loss": 1.25}\n')
    verdict = {"outcome": "failed", "exit_code": 1, "step": 25, "reason": "rank 1: out of memory", "seconds": 61.0}
    (folder / "attempts/1/verdict.json").write_text(json.dumps(verdict))
    write_status(folder, Status("running", 0, 20, attempt=2, time=100.0))
    write_rank_status(folder, 1, Status("failed", 1, 25, "out of memory"))
    (folder / "logs/rank-00000.log").write_text("".join(f"line {i}\n" for i in range(100)))
    return folder


def test_status_tells_what_the_files_say(run_folder):
    text = render_status(run_status(run_folder), now=220.0)
    for part in (
        "running, says its status, but no launcher",
        "(2.0 min ago)",
        "25 of 40",
        "train/loss 1.25",
        "step-000020  (1 kept)",
        "rank 1      failed at step 25: out of memory",
        "attempt 1   failed at step 25 after 1.0 min: rank 1: out of memory",
    ):
        assert part in text, text
    assert invoke("status", "digits").exit_code == 0
    facts = json.loads(invoke("status", run_folder, "--json").stdout)
    assert (facts["status"]["step"], facts["launcher_alive"], list(facts["attempts"])) == (20, False, ["1"])


def test_status_of_a_held_run_is_plain(run_folder):
    from trichord_launch.supervise import run_lock

    with run_lock(run_folder):
        assert "outcome     running  (" in render_status(run_status(run_folder), now=110.0)


def test_status_of_a_run_that_was_only_looked_at(tmp_path):
    (tmp_path / "preflight").mkdir()
    assert "not started" in render_status(run_status(find_run(str(tmp_path))))


def test_a_folder_that_is_no_run_is_told_by_every_verb(run_folder, tmp_path):
    (tmp_path / "data").mkdir()
    for verb in ("status", "logs", "cancel", "attach"):
        assert "data is no run folder; a run's holds status.json, " in str(invoke(verb, tmp_path / "data").exception)
    assert "runs is no run folder; runs in it: digits" in str(invoke("status", "runs").exception)
    (tmp_path / "digits").mkdir()
    assert find_run("digits") == Path("runs/digits"), "a folder of that name that is no run hides none"


BROKEN = [
    ("status.json", '{"outcome": "running", "exit_'),
    ("status.json", '{"outcome": "running", "exit_code": 0, "step": "seven"}'),
    ("status.json", '{"outcome": "running", "exit_code": 0, "step": 7, "time": null}'),
    ("status.json", "[]"),
    ("status.json", b"\xff\xfe"),
    ("status.rank-1.json", ""),
    ("status.rank-1.json", '{"outcome": "asleep", "exit_code": 1, "step": 7}'),
    ("submissions/1/links.json", '{"job_ids": "7", "time": 1}'),
    ("submissions/1/links.json", '{"job_ids": ["7"], "time": "now"}'),
]


@pytest.mark.parametrize(("name", "text"), BROKEN)
def test_a_file_somebody_broke_is_told_and_the_rest_is_shown(run_folder, name, text):
    (run_folder / "submissions" / "1").mkdir(parents=True)
    (run_folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    result = invoke("status", run_folder)
    assert (result.exit_code, result.exception) == (0, None)
    assert f"broken      {run_folder / name}" in result.stdout
    assert "attempt 1   failed at step 25" in result.stdout
    assert name in json.loads(invoke("status", run_folder, "--json").stdout)["broken"][0]
    for verb in ("logs", "cancel", "attach"):
        error = invoke(verb, run_folder).exception
        assert error is None or isinstance(error, TrichordError), verb


def test_facts_somebody_broke_are_left_out(run_folder, fake_slurm):
    (run_folder / "status.rank-x.json").write_text("{}")
    (run_folder / "metrics.jsonl").write_text('{"step": 25, "train/loss": 1.25}\n')
    (run_folder / "attempts/1/verdict.json").write_text('{"outcome": "failed", "seconds": "long", "why": "so"}')
    (run_folder / "attempts/2/command.json").write_text('{"nodes": 2, "ranks_per_node": 0}')
    (run_folder / "submissions" / "1").mkdir(parents=True)
    (run_folder / "submissions/1/links.json").write_text('{"job_ids": ["7"], "time": 1}')
    said = invoke("status", run_folder).stdout
    assert "train/loss 1.25  (step 25)" in said
    assert "attempt 1   failed at step ?: ?; ?: so" in said
    assert "no log of rank 5" in str(invoke("logs", run_folder, "--rank", 5).exception)
    assert "does not say on which nodes the ranks are" in str(invoke("attach", run_folder).exception)


def test_an_unknown_run_names_the_nearest(run_folder):
    with pytest.raises(ConfigError, match="nearest: digits"):
        find_run("digit")
    with pytest.raises(ConfigError, match="holds no runs"):
        find_run("digit", root=run_folder / "nothing")


def test_logs_print_the_end_of_a_ranks_file(run_folder):
    result = invoke("logs", "digits", "-n", 2)
    assert result.stdout == "line 98\nline 99\n"
    with pytest.raises(ConfigError, match=r"no log of rank 5; there are: rank-00000\.log"):
        log_file(run_folder, 5)


def test_a_rank_that_never_opened_its_log_has_what_torchrun_caught(run_folder):
    for attempt in (1, 2):
        caught = run_folder / f"attempts/{attempt}/torchrun/digits_x/attempt_0/1/stderr.log"
        caught.parent.mkdir(parents=True)
        caught.write_text("ImportError\n")
        os.utime(caught, (attempt, attempt))
    assert "attempts/2" in str(log_file(run_folder, 1))


def test_following_a_log_yields_what_is_appended(run_folder):
    path = run_folder / "logs/rank-00000.log"
    lines = tail(path, 1, follow=True, poll_s=0.01)
    assert next(lines) == "line 99\n"
    with open(path, "a") as file:
        file.write("line 100\n")
    assert next(lines) == "line 100\n"


def test_a_verdict_of_another_version_is_shown_as_far_as_it_is_known(run_folder):
    folder = run_folder / "attempts" / "7"
    folder.mkdir(parents=True)
    (folder / "verdict.json").write_text('{"outcome": "failed"}')
    assert "attempt 7   failed at step ?: ?" in render_status(run_status(run_folder))
