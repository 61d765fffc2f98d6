"""Which run a folder is, and what may change when it goes on."""

import json
import subprocess

import pytest

from trichord.config import identity
from trichord.config.environment import environment, git_state
from trichord.config.identity import compare_for_resume, inspect_run_folder, prepare_run_folder, read_run_config
from trichord.config.load import load_run_config
from trichord.core.errors import CheckpointError, ConfigError


@pytest.fixture
def config(tmp_path):
    """Builds the tiny shipped config as run `name` under a temporary root, with overrides."""

    def build(*overrides, name="a"):
        return load_run_config("debug/tiny.yaml", [f"run.root={tmp_path}", f"run.name={name}", *overrides])

    return build


def begin(config):
    """Prepare a run and give it a checkpoint, which is what binds its config."""
    folder = prepare_run_folder(config)
    step = folder.path / "checkpoints" / "step-000005"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def quick_git(monkeypatch):
    monkeypatch.setattr(identity, "git_state", lambda: {"sha": "0" * 40})


MAY_CHANGE = [
    ("run.max_steps", 20),
    ("shards.sources.pairs.weight", 9),
    ("batches.micro_rows", 4),
    ("batches.num_workers", 2),
    ("layers.kernels", "reference"),
    ("engine.zero_stage", 3),
    ("engine.lr", 1),
    ("engine.schedule", "linear"),
    ("engine.deepspeed", {"gradient_predivide_factor": 2.0}),
    ("engine.timeout_s", 9),
    ("checkpoints.keep_last", 9),
    ("tracking.wandb.project", "p"),
]
MAY_NOT_CHANGE = [
    ("run.seed", 5, "run.seed: 0 in the run, 5 now"),
    ("run.init_from", "w", 'run.init_from: not set in the run, "w" now'),
    ("shards.window_samples", 99, "shards.window_samples: 16 in the run, 99 now"),
    ("shards.sources.pairs.epochs", "3", "shards.sources.pairs.epochs: "),
    ("samples.image.size", 64, "samples.image.size: 32 in the run, 64 now"),
    ("batches.rows_per_step", 8, "batches.rows_per_step: 4 in the run, 8 now"),
    ("batches.row_tokens", 512, "batches.row_tokens: 256 in the run, 512 now"),
    ("batches.tokenizer", "t", "batches.tokenizer: "),
    ("fusion.trunk.num_layers", 3, "fusion.trunk.num_layers: 1 in the run, 3 now"),
    ("encoders.audio.hidden_size", 64, "encoders.audio.hidden_size: 32 in the run, 64 now"),
    ("objectives.contrastive", None, "objectives.contrastive: "),
    ("engine.precision", "autocast_bf16", 'engine.precision: "fp32" in the run, "autocast_bf16" now'),
    ("engine.weight_decay", 0, "engine.weight_decay: 0.1 in the run, 0.0 now"),
]


@pytest.mark.parametrize(("key", "value"), MAY_CHANGE)
def test_keys_of_layout_length_schedule_and_tracking_may_change(config, key, value):
    new = config(f"{key}={json.dumps(value)}")
    assert new != config()
    compare_for_resume(config(), new)


@pytest.mark.parametrize(("key", "value", "words"), MAY_NOT_CHANGE)
def test_any_other_key_is_refused_with_both_values(config, key, value, words):
    with pytest.raises(CheckpointError, match="may not change on resume") as caught:
        compare_for_resume(config(), config(f"{key}={json.dumps(value)}"))
    assert words in str(caught.value)
    assert caught.value.exit_code == 4


def test_sources_are_compared_by_name_and_order(config):
    new = config()
    a, b, c = new.shards.sources
    for sources, words in [((b, a, c), "shards.sources: "), ((a, b), "shards.sources.speech: ")]:
        changed = new.model_copy(update={"shards": new.shards.model_copy(update={"sources": sources})})
        with pytest.raises(CheckpointError, match=words):
            compare_for_resume(config(), changed)


def test_every_listed_key_exists():
    data = identity._comparable(load_run_config("debug/tiny.yaml"))
    for key in identity.MAY_CHANGE_ON_RESUME:
        here = data
        for part in key.removesuffix(".**").split("."):
            here = next(iter(here.values())) if part == "*" else here[part]


def test_a_fresh_run_then_its_next_attempts(config, tmp_path):
    first = begin(config())
    assert (first.kind, first.path, first.attempt) == ("fresh", tmp_path / "a", 1)
    second = prepare_run_folder(config("engine.lr=0.5"))
    assert (second.kind, second.attempt) == ("resume", 2)
    assert read_run_config(first.path).engine.lr == 0.5
    assert read_run_config(first.attempt_path).engine.lr == 1e-3
    record = json.loads((second.attempt_path / "environment.json").read_text())
    assert record["attempt"] == 2
    assert record["packages"]["pydantic"]
    assert record["git"]["sha"] == "0" * 40


def test_a_folder_with_only_a_launchers_logs_is_still_fresh(config, tmp_path):
    (tmp_path / "a" / "logs").mkdir(parents=True)
    (tmp_path / "a" / "attempts" / "1").mkdir(parents=True)
    folder = prepare_run_folder(config("run.resume=never"))
    assert (folder.kind, folder.attempt) == ("fresh", 2)


def test_two_starts_never_share_an_attempt(config, monkeypatch):
    monkeypatch.setattr(identity, "_next_attempt", lambda path: 1)  # both looked before either wrote
    assert [prepare_run_folder(config()).attempt for _ in range(3)] == [1, 2, 3]


def test_never_refuses_a_folder_that_holds_a_run(config):
    prepare_run_folder(config())
    with pytest.raises(ConfigError, match=r"exists and run\.resume is never"):
        prepare_run_folder(config("run.resume=never"))


def test_a_first_attempt_that_died_without_a_checkpoint_binds_nothing(config):
    prepare_run_folder(config("batches.tokenizer=typo"))
    folder = prepare_run_folder(config())
    assert (folder.kind, folder.attempt) == ("fresh", 2)
    assert read_run_config(folder.path).batches.tokenizer != "typo"


def test_a_run_without_its_config_is_refused(config):
    (begin(config()).path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no run folder: it holds no config\.yaml"):
        prepare_run_folder(config())


def test_a_config_of_another_version_is_said_to_be_one(config):
    folder = begin(config())
    file = folder.path / "config.yaml"
    file.write_text(file.read_text() + "future: {a: 1}\n")
    with pytest.raises(CheckpointError, match="does not load with this version"):
        prepare_run_folder(config())


def test_a_refused_continuation_leaves_the_folder_as_it_was(config):
    folder = begin(config())
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError):
        prepare_run_folder(config("run.seed=9"))
    assert before == {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


def test_a_branch_starts_elsewhere_and_then_resumes_itself(config):
    source = begin(config())
    branch = config("run.resume=a@20", "engine.lr=0.1", name="b")
    for attempt in (1, 2):  # died before its first checkpoint: the second attempt starts from the source again
        folder = prepare_run_folder(branch)
        assert (folder.kind, folder.attempt) == ("branch", attempt)
        assert (folder.branch_folder, folder.branch_step) == (source.path, 20)
    begin(branch)
    assert prepare_run_folder(branch).kind == "resume"


def test_a_branch_names_its_source_by_path_too(config, tmp_path):
    begin(config())
    assert inspect_run_folder(config(f"run.resume={tmp_path / 'a'}@3", name="b")).branch_step == 3


@pytest.mark.parametrize(
    ("overrides", "name", "error", "words"),
    [
        (["run.resume=zzz@5"], "b", CheckpointError, "no run folder at zzz"),
        (["run.resume=a@5"], "a", ConfigError, "a branch of a needs a run.name of its own"),
        (["run.resume=a@5", "run.init_from=w"], "b", ConfigError, "both starting points"),
        (["run.resume=a@5", "samples.image.size=64"], "b", CheckpointError, "samples.image.size"),
        (["run.resume=a@5"], "c", ConfigError, "did not start as a branch of a@5"),
    ],
)
def test_branches_that_cannot_be(config, overrides, name, error, words):
    begin(config())
    begin(config(name="c"))
    with pytest.raises(error) as caught:
        prepare_run_folder(config(*overrides, name=name))
    assert words in str(caught.value)


def test_roots_that_cannot_hold_a_run(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare_run_folder(config(f"run.root={tmp_path / 'file'}"))
    with pytest.raises(ConfigError, match="mounted file system"):
        prepare_run_folder(config("run.root=s3://bucket/runs"))


def test_git_state_tells_clean_from_dirty_and_never_fails(tmp_path, monkeypatch):
    assert git_state(tmp_path) == {"sha": None, "dirty": None, "diff_sha256": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "m"], check=True)
    clean = git_state(tmp_path)
    assert len(clean["sha"]) == 40
    assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
    (tmp_path / "f").write_text("2")
    dirty = git_state(tmp_path)
    assert dirty["dirty"]
    (tmp_path / "f").write_text("3")
    assert git_state(tmp_path)["diff_sha256"] not in (None, dirty["diff_sha256"])
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path)["sha"] is None


def test_environment_holds_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("TRICHORD_KERNELS", "reference")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("TRICHORD_API_KEY", "secret")
    facts = environment()
    assert facts["packages"]["trichord"]
    assert facts["variables"]["TRICHORD_KERNELS"] == "reference"
    assert "secret" not in json.dumps(facts)
