"""The Weights & Biases mirror: modes, resume decisions against a stand-in, and real offline files read back."""

import json
import struct
import sys
import types

import pytest

from trichord.core.errors import ConfigError
from trichord.tracking.config import WandbConfig
from trichord.tracking.metrics import MetricsWriter
from trichord.tracking.wandb import WandbMirror, resolve_mode, sync_run

FACTS = {"run_name": "digits", "run_config": {"engine": {"lr": 3e-4}}, "attempt": 2}


class StandIn(types.ModuleType):
    """A `wandb` that notes what it is asked, and fails where told."""

    Settings = type("Settings", (dict,), {"model_fields": {"console": None, "init_timeout": None}})

    def __init__(self, fail=()):
        super().__init__("wandb")
        self.fail, self.inits, self.logged, self.finished = set(fail), [], [], []

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

    def finish(self, exit_code=0):
        self.finished.append(exit_code)


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
    assert [init.get("resume_from") for init in wandb.inits] == ["abc123de?_step=40"]
    assert wandb.logged == [({"train/loss": 2.0, "step": 41}, 41)]


def test_where_rewinding_is_refused_the_run_is_continued_with_the_attempt(online, tmp_path):
    wandb = online("rewind")
    mirror = WandbMirror(WandbConfig(), tmp_path, **FACTS, run_id="abc123de", resume_step=40)
    mirror.log(41, {"train/loss": 2.0})
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


def test_sync_of_a_folder_without_metrics_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        sync_run(tmp_path)


def read_offline_run(location):
    """(history rows, project, config lr) of an offline run: LevelDB log framing around protobuf records."""
    from pathlib import Path

    from wandb.proto import wandb_internal_pb2

    (path,) = Path(location).glob("*.wandb")
    data, at, payload, rows, project, lr = path.read_bytes(), 7, b"", [], None, None
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
        record = wandb_internal_pb2.Record.FromString(payload)
        payload = b""
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            rows[-1].setdefault("_step", record.history.step.num)
        if record.HasField("run"):
            project = record.run.project
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            lr = config["engine"]["lr"]
    return rows, project, lr
