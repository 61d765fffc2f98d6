"""The real W&B client against a stand-in for its server (tests/wandb_server.py): what arrives, and a server that goes.

What the real server does with the same requests is not shown here.
"""

import json

import numpy as np
import psutil
import pytest

from trichord.core.errors import TrichordError
from trichord.tracking import wandb as wandb_module
from trichord.tracking.config import TrackingConfig, WandbConfig
from trichord.tracking.metrics import MetricsWriter
from trichord.tracking.previews import PreviewsWriter
from trichord.tracking.recorder import Recorder
from trichord.tracking.sample_view import SampleView
from trichord.tracking.wandb import WandbMirror
from trichord.tracking.wandb_media import Reference
from trichord.tracking.wandb_service import end_service
from trichord.tracking.wandb_sync import sync_run
from wandb_server import wandb_server

pytest.importorskip("wandb")

FACTS = {"run_name": "digits", "run_config": {"engine": {"lr": 3e-4}}}
CONFIG = WandbConfig(mode="online", project="voices", entity="lab", group="sweep", tags=("small", "first"))


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """A function that starts a server, to which the client is led."""
    opened = []
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))

    def start(**keys):
        opened.append(manager := wandb_server(**keys))
        server = manager.__enter__()
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        end_service()  # it knows the server of an earlier test
        return server

    yield start
    end_service()
    for manager in opened:
        manager.__exit__(None, None, None)


def steps(run) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in run.history]


def test_what_a_run_records_arrives(serve, tmp_path):
    server = serve()
    (tmp_path / "environment.json").write_text(json.dumps({"git": {"sha": "abc"}}))
    facts = {"run_facts": FACTS["run_config"], "attempt": 1, "resume_step": None, "total_steps": 30}
    names = {"run_name": "digits", "wandb_run_id": None}
    recorder = Recorder(tmp_path, TrackingConfig(wandb=CONFIG), active=True, **facts, **names)
    for step in (10, 20, 30):
        recorder.metrics(step, {"train/loss": 1 / step})
    writer = PreviewsWriter(tmp_path, ["scans"], 16000, 1)
    pixels, waveform = np.full((3, 40, 400), 200, np.uint8), np.zeros(1600, np.int16)
    samples = [SampleView(0, 0, 3, "", "three", "tree", 0.5, (pixels,), (waveform,))]
    recorder.previews(30, writer.write(30, samples))
    place = tmp_path / "checkpoints" / "step-000030"
    place.mkdir(parents=True)
    (place / "manifest.json").write_text(json.dumps({"files": {"rank-00000.safetensors": {"size": 4}}}))
    (place / "rank-00000.safetensors").write_bytes(b"1234")
    recorder.event("end", 30, finished=False, checkpoint_saved=True, signal="SIGTERM")
    recorder.close(75)

    (run,) = server.runs.values()
    asked = {name: run.facts[name] for name in ("project", "entity", "groupName", "tags", "displayName")}
    assert asked == {
        "project": "voices",
        "entity": "lab",
        "groupName": "sweep",
        "tags": ["small", "first"],
        "displayName": "digits",
    }
    assert run.config["engine"] == {"lr": 3e-4}
    assert run.config["environment"] == {"git": {"sha": "abc"}}
    rows = [(row["_step"], row["step"], row["train/loss"]) for row in run.history if "train/loss" in row]
    assert rows == [(step, step, pytest.approx(1 / step)) for step in (10, 20, 30)]
    assert any("system.proc.memory.rssMB" in line for line in run.streams["wandb-events.jsonl"]), "system metrics"
    assert run.exit_code == 75
    by_type = {made["artifactTypeName"]: made for made in server.artifacts}
    assert all(made["committed"] for made in server.artifacts)
    checkpoint = by_type["checkpoint"]
    assert {alias["alias"] for alias in checkpoint["aliases"]} == {"latest", "step-30"}
    entries = server.manifest(checkpoint)
    assert entries["rank-00000.safetensors"]["ref"] == f"{place.as_uri()}/rank-00000.safetensors"
    table = server.manifest(by_type["run_table"])
    assert {name.rpartition(".")[2] for name in table} == {"json", "jpg", "wav"}
    assert len([name for name in server.uploads if name.endswith((".jpg", ".wav"))]) >= 2, "players have their files"
    (alert,) = server.alerts
    assert (alert["title"], alert["text"], alert["severity"], alert["runName"]) == (
        *("digits stopped", "stopped at step 30 by SIGTERM", "WARN"),
        run.name,
    )


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_resumed_run_goes_on_in_the_same_run(serve, tmp_path, log_lines, rewinds):
    server = serve(rewinds=rewinds)
    first = WandbMirror(CONFIG, tmp_path, **FACTS, attempt=1)
    for step in (1, 2, 3, 4, 5):
        first.log(step, {"train/loss": 1.0})
    first.finish(1)
    again = WandbMirror(CONFIG, tmp_path, **FACTS, attempt=2, run_id=first.run_id, resume_step=3)
    for step in (4, 5, 6):
        again.log(step, {"train/loss": 2.0})
    again.finish()
    (run,) = server.runs.values()
    assert run.name == first.run_id
    kept = [(step, 1.0) for step in ((1, 2, 3) if rewinds else (1, 2, 3, 4, 5))]
    assert steps(run) == [*kept, (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [row["_step"] for row in run.history] == list(range(1, len(run.history) + 1)), "W&B's steps go up"
    assert [row.get("attempt") for row in run.history[-3:]] == [None if rewinds else 2] * 3
    assert any("did not rewind" in line for line in log_lines()) != rewinds
    assert run.exit_code == 0


@pytest.mark.parametrize("how", ["hang", "error", "gone"])
def test_a_server_that_goes_costs_a_bounded_time_at_the_end(serve, tmp_path, monkeypatch, log_lines, how):
    monkeypatch.setattr(wandb_module, "_FINISH_TIMEOUT_S", 1.0)
    server, record = serve(), MetricsWriter(tmp_path, resume_step=None)
    mirror = WandbMirror(CONFIG, tmp_path, **FACTS, attempt=1)

    def log(step):
        record.log(step, {"train/loss": 1 / step})
        mirror.log(step, {"train/loss": 1 / step})

    log(1)
    if how == "gone":
        server.stop()
    else:
        server.ill = how
    mirror.alert("digits", "no way there", "ERROR")  # W&B's own time limit does not hold for this one
    mirror.reference(Reference("digits-checkpoint", "checkpoint", tmp_path.as_uri(), ()))  # for this one W&B waits
    log(2)
    assert not [line for line in log_lines() if "artifact" in line], "nobody waited for its answer"
    mirror.finish()
    assert any("wandb did not take everything within 1 s; metrics.jsonl has" in line for line in log_lines())
    assert not [child for child in psutil.Process().children() if child.name() == "wandb-core"], "nothing goes on alone"
    if how == "gone":
        server = serve()
    server.recover()
    result = sync_run(tmp_path, mode="online")
    (run,) = server.runs.values()
    assert (result.run_id, run.name) == (mirror.run_id, mirror.run_id)
    assert steps(run) == [(1, 1.0), (2, 0.5)]


def test_sync_to_a_server_that_refuses_says_so(serve, tmp_path):
    serve(takes_runs=False)
    MetricsWriter(tmp_path, resume_step=None).log(1, {"train/loss": 1.0})
    with pytest.raises(TrichordError, match=r"wandb could not take the run .*permission denied"):
        sync_run(tmp_path, mode="online")
