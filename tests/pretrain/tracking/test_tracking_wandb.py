"""The Weights & Biases mirror: modes, resume decisions against a stand-in, and real offline files read back."""

import json
import struct
import sys
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from trichord.core.errors import ConfigError
from trichord.tracking.config import TrackingConfig, WandbConfig
from trichord.tracking.metrics import MetricsWriter, append_event
from trichord.tracking.previews import PreviewsWriter
from trichord.tracking.recorder import Recorder
from trichord.tracking.sample_view import SampleView
from trichord.tracking.wandb import WandbMirror, resolve_mode
from trichord.tracking.wandb_sync import sync_run

FACTS = {"run_name": "digits", "run_config": {"engine": {"lr": 3e-4}}, "attempt": 2}


class StandInArtifact:
    """Refers to files as W&B does; to s3 only with a client that is not there."""

    def __init__(self, name, type, metadata):
        self.name, self.type, self.metadata, self.entries = name, type, metadata, []

    def add_reference(self, uri, checksum):
        assert not checksum, "a checkpoint is not read again"
        if uri.startswith("s3://"):
            raise RuntimeError("boto3 is required")
        self.entries.append(uri)


class StandIn(types.ModuleType):
    """A `wandb` that notes what it is asked, and fails where told."""

    Settings = type("Settings", (dict,), {"model_fields": {"console": None, "init_timeout": None}})

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.fail, self.inits, self.logged, self.finished = set(fail), [], [], []
        self.alerts, self.artifacts, self.Artifact = [], [], StandInArtifact

    def init(self, **arguments):
        self.inits.append(arguments)
        if "init" in self.fail or ("resume_from" in arguments and "rewind" in self.fail):
            raise RuntimeError("server says no")
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, row, step=None):
        if "log" in self.fail:
            raise RuntimeError("service died")
        self.logged.append((row, step))

    def alert(self, **facts):
        self.alerts.append(facts)

    def log_artifact(self, artifact, aliases):
        if "artifact" in self.fail:
            raise RuntimeError("quota")
        self.artifacts.append((artifact, aliases))

    def finish(self, exit_code=0):
        self.finished.append(exit_code)

    def teardown(self):
        """There is no process to end."""


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)

    def install(*fail):
        stand_in = StandIn(fail)
        monkeypatch.setitem(sys.modules, "wandb", stand_in)
        return stand_in

    return install


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("mode", "environ", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "off"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "online"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("off", {"WANDB_API_KEY": "k"}, "off"),
    ],
)
def test_modes(mode, environ, expected, tmp_path):
    assert resolve_mode(mode, {"HOME": str(tmp_path), **environ}) == expected


def test_a_netrc_entry_is_a_key(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    assert resolve_mode("auto", {"HOME": str(tmp_path)}) == "online"
    assert resolve_mode("auto", {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"


def test_a_new_run_logs_at_our_step(online, tmp_path):
    wandb = online()
    mirror = WandbMirror(WandbConfig(group="g"), tmp_path, **FACTS)
    mirror.log(7, {"train/loss": 2.0})
    mirror.finish(75)
    (init,) = wandb.inits
    assert (init["id"], init["mode"], init["name"], init["group"]) == (mirror.run_id, "online", "digits", "g")
    assert "resume" not in init
    assert wandb.logged == [({"train/loss": 2.0, "step": 7}, 7)]
    assert wandb.finished == [75]


def test_resume_rewinds_to_the_checkpoint(online, tmp_path):
    wandb = online()
    mirror = WandbMirror(WandbConfig(), tmp_path, **FACTS, run_id="abc123de", resume_step=40)
    mirror.log(41, {"train/loss": 2.0})
    mirror.finish()
    assert [init.get("resume_from") for init in wandb.inits] == ["abc123de?_step=40"]
    assert wandb.logged == [({"train/loss": 2.0, "step": 41}, 41)]


def test_where_rewinding_is_refused_the_run_is_continued_with_the_attempt(online, tmp_path):
    wandb = online("rewind")
    mirror = WandbMirror(WandbConfig(), tmp_path, **FACTS, run_id="abc123de", resume_step=40)
    mirror.log(41, {"train/loss": 2.0})
    mirror.finish()
    assert [(init.get("id"), init.get("resume")) for init in wandb.inits] == [(None, None), ("abc123de", "allow")]
    assert wandb.logged == [({"train/loss": 2.0, "step": 41, "attempt": 2}, None)], "W&B's own step has moved on"
    wandb = online()
    WandbMirror(WandbConfig(), tmp_path, **FACTS, run_id="abc123de", resume_step=60)
    assert [init.get("resume") for init in wandb.inits] == ["allow"], "once continued, W&B's steps are no longer ours"


def test_a_restart_before_the_first_checkpoint_keeps_the_id(online, tmp_path):
    online()
    first = WandbMirror(WandbConfig(), tmp_path, **FACTS)
    second = WandbMirror(WandbConfig(), tmp_path, **FACTS)
    assert second.run_id == first.run_id
    assert WandbMirror(WandbConfig(), tmp_path / "other", **FACTS).run_id != first.run_id


@pytest.mark.parametrize("fail", ["init", "log"])
def test_a_failure_warns_once_and_never_raises(online, tmp_path, log_lines, fail):
    online(fail)
    mirror = WandbMirror(WandbConfig(), tmp_path, **FACTS)
    for step in range(1, 4):
        mirror.log(step, {"train/loss": 1.0})
    mirror.finish()
    assert len(log_lines()) == 1
    assert "going on without it" in log_lines()[0]
    assert mirror.run_id, "the checkpoint still has an id to store"


def test_a_missing_package_is_only_a_warning(no_key, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirror = WandbMirror(WandbConfig(mode="offline"), tmp_path, **FACTS)
    mirror.log(1, {"train/loss": 1.0})
    mirror.finish()


def test_off_touches_nothing(online, tmp_path):
    wandb = online()
    mirror = WandbMirror(WandbConfig(mode="off"), tmp_path, **FACTS, run_id="abc123de")
    mirror.log(1, {"train/loss": 1.0})
    mirror.finish()
    assert (wandb.inits, list(tmp_path.iterdir()), mirror.run_id) == ([], [], "abc123de")


def test_sync_rebuilds_one_run_from_the_record(no_key, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "runs" / "digits"
    for resume_step, steps in ((None, range(1, 31)), (20, range(21, 41))):
        writer = MetricsWriter(folder, resume_step=resume_step)
        for step in steps:
            writer.log(step, {"train/loss": 1.0 / step})
    writer.log(40, {"eval/digits/r_at_1_frac": 0.9})
    (folder / "config.yaml").write_text("engine: {lr: 0.001}\ntracking: {wandb: {project: voices}}\n")
    result = sync_run(folder)
    assert (result.mode, result.rows) == ("offline", 40)
    assert sync_run(folder).run_id == result.run_id, "the same run again, not one more"
    rows, project, lr = read_offline_run(result.location)
    assert [(row["_step"], row["step"]) for row in rows] == [(step, step) for step in range(1, 41)]
    assert [row["train/loss"] for row in rows] == [1.0 / step for step in range(1, 41)]
    assert rows[-1]["eval/digits/r_at_1_frac"] == 0.9
    assert abs(rows[0]["_timestamp"] - rows[-1]["_timestamp"]) < 60
    assert (project, lr) == ("voices", 0.001)


def test_a_service_that_ended_between_two_runs_is_started_again(no_key, tmp_path):
    pytest.importorskip("wandb")
    MetricsWriter(tmp_path, resume_step=None).log(1, {"train/loss": 1.0})
    sync_run(tmp_path)
    services = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
    assert services, "the one that the first run has started"
    for service in services:
        service.kill()
        service.wait(10)
    assert sync_run(tmp_path).rows == 1


FACTS_OF_RECORDER = {
    "active": True,
    "attempt": 1,
    "resume_step": None,
    "total_steps": 30,
    "run_name": "digits",
    "wandb_run_id": None,
    "run_facts": {
        "checkpoints": {"mirror": "s3://store/runs", "keep_best": {"metric": "eval/x/loss", "mode": "min", "count": 1}}
    },
}


def checkpoint(folder, step, score):
    """A complete checkpoint as retention sees it."""
    place = folder / "checkpoints" / f"step-{step:06d}"
    place.mkdir(parents=True)
    state = json.dumps({"step": step, "metrics": {"eval/x/loss": score}})
    (place / "train_state.json").write_text(state)
    (place / "manifest.json").write_text(json.dumps({"files": {"train_state.json": {"size": len(state)}}}))
    return place


def test_checkpoints_become_references_and_a_stop_an_alert(online, tmp_path):
    """Against a stand-in for W&B, not against a server."""
    wandb = online()
    recorder = Recorder(tmp_path, TrackingConfig(), **FACTS_OF_RECORDER)
    places = [checkpoint(tmp_path, step, score) for step, score in ((10, 2.0), (20, 3.0))]
    recorder.event("checkpoint", 10)
    recorder.event("mirror", 10, ok=True)
    recorder.event("mirror", 20, ok=False, reason="no way there")
    recorder.event("end", 20, finished=False, checkpoint_saved=True, signal="SIGTERM")
    recorder.event("checkpoint", 15)  # removed in the meantime
    recorder.event("end", 20, finished=True, checkpoint_saved=False, signal="")
    recorder.failed("rank 3: out of memory")
    recorder.close(75)
    assert wandb.finished == [1], "whoever fails closes the run: its process may leave at once"
    assert [(a.name, a.type, a.entries, aliases) for a, aliases in wandb.artifacts] == [
        ("digits-checkpoint", "checkpoint", [places[0].as_uri()], ["latest", "step-10", "best"]),
        ("digits-checkpoint", "checkpoint", [], ["latest", "step-10", "best"]),
        ("digits-checkpoint", "checkpoint", [places[1].as_uri()], ["latest", "step-20"]),
    ]
    assert wandb.artifacts[1][0].metadata["uri"] == f"s3://store/runs/{tmp_path.name}/step-000010"
    assert [(a["title"], a["text"], a["level"]) for a in wandb.alerts] == [
        ("digits stopped", "stopped at step 20 by SIGTERM", "WARN"),
        ("digits failed", "the last checkpoint (step 20) could not be written", "ERROR"),
        ("digits failed", "rank 3: out of memory", "ERROR"),
    ]


def test_an_artifact_that_is_refused_is_only_a_warning(online, tmp_path, log_lines):
    wandb = online("artifact")
    recorder = Recorder(tmp_path, TrackingConfig(), **FACTS_OF_RECORDER)
    checkpoint(tmp_path, 10, 1.0)
    recorder.event("checkpoint", 10)
    recorder.metrics(11, {"train/loss": 1.0})
    recorder.close(0)
    (told,) = [line for line in log_lines() if "wandb" in line]
    assert "wandb could not log an artifact (RuntimeError: quota); metrics.jsonl has everything" in told
    assert [step for _, step in wandb.logged] == [11], "the metrics go on"


def test_tables_artifacts_and_surroundings_are_in_an_offline_run(no_key, tmp_path):
    """Of a run as it goes, and of one rebuilt from its folder: read back from the files that W&B wrote."""
    pytest.importorskip("wandb")
    (tmp_path / "environment.json").write_text(json.dumps({"host": "here", "git": {"sha": "abc"}}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(FACTS_OF_RECORDER["run_facts"]))
    writer = PreviewsWriter(tmp_path, ["scans"], 16000, 1)
    pixels, waveform = np.full((3, 40, 400), 200, np.uint8), np.zeros(1600, np.int16)
    samples = [SampleView(0, 0, 3, "", "three", "tree", 0.5, (pixels,), (waveform,))]
    recorder = Recorder(tmp_path, TrackingConfig(), **FACTS_OF_RECORDER)
    recorder.metrics(10, {"train/loss": 1.0})
    recorder.previews(10, writer.write(10, samples))
    place = checkpoint(tmp_path, 10, 1.0)
    recorder.event("checkpoint", 10)
    recorder.event("end", 10, finished=True, checkpoint_saved=True)
    recorder.close(0)
    (live,) = (tmp_path / "wandb").glob("offline-run-*")
    (tmp_path / "exported").mkdir()
    append_event(tmp_path, "export", step=10, attempt=1, out=tmp_path / "exported", ema=False)
    synced = sync_run(tmp_path)
    assert (synced.tables, synced.artifacts) == (1, 3)
    of_models = [r.artifact for r in read_records(synced.location) if r.artifact.type == "model"]
    assert [(a.name, sorted(a.aliases)) for a in of_models] == [(f"{tmp_path.name}-model", ["latest", "step-10"])]
    for location in (live, synced.location):
        records = read_records(location)
        references = [a.manifest.contents for a in (r.artifact for r in records if r.HasField("artifact"))]
        assert any(place.as_uri() in str(contents) for contents in references)
        aliases = [sorted(r.artifact.aliases) for r in records if r.HasField("artifact") and r.artifact.aliases]
        assert ["best", "final", "latest", "step-10"] in aliases
        config = {i.key: json.loads(i.value_json) for r in records if r.HasField("run") for i in r.run.config.update}
        assert config["environment"]["git"]["sha"] == "abc"
        (table,) = Path(location).glob("files/media/table/*.json")
        (cells,) = json.loads(table.read_text())["data"]
        assert (cells[0], cells[1], cells[5], cells[6]) == (10, "scans", "three", "tree")
        (table,) = [r.artifact for r in records if r.HasField("artifact") and r.artifact.type == "run_table"]
        kept = {Path(entry.path).suffix: entry.size for entry in table.manifest.contents}
        assert kept[".jpg"] > 100, "the picture goes with its table"
        assert kept[".wav"] == 44 + 2 * 1600, "and so does the clip"


def test_sync_of_a_folder_without_metrics_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        sync_run(tmp_path)


def read_offline_run(location):
    """(history rows, project, config lr) of an offline run: LevelDB log framing around protobuf records."""
    rows, project, lr = [], None, None
    for record in read_records(location):
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            rows[-1].setdefault("_step", record.history.step.num)
        if record.HasField("run"):
            project = record.run.project
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            lr = config["engine"]["lr"]
    return rows, project, lr


def read_records(location):
    from wandb.proto import wandb_internal_pb2

    (path,) = Path(location).glob("*.wandb")
    data, at, payload, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        payload += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # 1 whole record, 4 last part of one
            continue
        found.append(wandb_internal_pb2.Record.FromString(payload))
        payload = b""
    return found
