"""A rewind: after a stretch of steps that are not finite, older weights with the data behind it."""

import hashlib
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from test_distributed_faults import check_end, indexed, run_with
from tiny_run import make_data

from trichord.checkpoints.hashes import file_facts
from trichord.checkpoints.load import find_latest
from trichord.checkpoints.manifest import step_folders
from trichord.checkpoints.slices import SliceReader
from trichord.engine.step import restart_loss_scale
from trichord.provenance import open_past
from trichord.replay import _state_before, replay_step
from trichord.restore import find_to_rewind
from trichord.tracking.metrics import merge_steps, read_metrics

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return indexed(make_data(tmp_path_factory.mktemp("data")))


RESNET = '{name: resnet18, options: {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}}'
REWINDING = (
    *("engine.max_bad_steps=2", "engine.rewinds=1", "engine.schedule=constant", "engine.lr=0.01"),
    *("batches.micro_rows=2", "checkpoints.keep_last=9", "run.max_steps=8"),
)


@pytest.mark.parametrize(
    ("stage", "interrupted", "more"),
    [
        pytest.param(0, False, ("engine.precision=autocast_bf16",), marks=pytest.mark.slow),
        (1, True, ()),
        pytest.param(2, False, ("engine.precision=bf16",), marks=pytest.mark.slow),
        (3, False, ("engine.ema_decay=0.5", f"encoders.vision={RESNET}")),
    ],
)
def test_after_a_rewind_a_run_is_one_that_began_with_those_weights_at_this_data(
    data, tmp_path, stage, interrupted, more
):
    """Steps 4 and 5 are not finite: back to the weights after step 2, and on with the data of step 6.

    interrupted: an attempt ends with step 4, with a checkpoint among the bad steps, which is no place to go back to.
    """
    overrides = (f"engine.zero_stage={stage}", *REWINDING, *more)
    if interrupted:
        run_with(data, tmp_path, 2, "not_finite", {"rank": 1, "steps": [3]}, *overrides, "run.max_steps=4")
        (tmp_path / "stderr-0").unlink()
    facts = {"rank": 1, "steps": [0] if interrupted else [3, 4]}
    ended = run_with(data, tmp_path, 2, "not_finite", facts, *overrides)
    assert ended.codes == {0: 0, 1: 0}
    assert [event["step"] for event in ended.events("skipped_step")] == [4, 5]
    (event,) = ended.events("rewind")
    assert (event["step"], event["to_step"], event["rewinds"]) == (5, 2, 1)
    assert "back to the weights of step-000002, on with the data of step 6 (rewind 1 of 1)" in ended.log(0)
    steps = [2, 4, 6, 8] if interrupted else [2, 6, 8]  # that of step 4 waits for the first finite one
    assert sorted(step_folders(ended.folder / "checkpoints")) == steps

    by_hand = tmp_path / "by-hand"
    shutil.copytree(ended.folder, by_hand / "tiny")
    begin_with(by_hand / "tiny", weights_of=2, data_of=5)
    again = run_with(data, by_hand, 2, "nothing", {}, *overrides)
    assert "going on from step-000005" in again.log(0)
    assert finite_lines(again.folder, 6) == finite_lines(ended.folder, 6)
    assert len(finite_lines(again.folder, 6)) == 3
    assert facts_at_end(again.folder) == facts_at_end(ended.folder)
    if interrupted:  # one process, from step 2 on: it goes back where the run did
        for step in (4, 6):
            shutil.rmtree(ended.folder / "checkpoints" / f"step-{step:06d}")
        (found,) = run_ranks(1, replay_step, ended.folder, 6)
        assert found.replayed_from == 2
        assert found.difference <= 1e-5


def test_rewinds_in_a_row_find_older_checkpoints_until_there_is_none(data, tmp_path):
    """The first takes step 4, since the bytes of step 6 have changed, the second step 2, which a copy of step 4 has not
    pushed out."""
    options = ("engine.rewinds=3", "engine.max_bad_steps=2", "checkpoints.keep_last=3", "run.max_steps=14")
    damaged = tmp_path / "tiny" / "checkpoints" / "step-000006" / "rank-00001.safetensors"
    facts = {"rank": 1, "steps": list(range(12, 28)), "damaged": str(damaged)}
    ended = run_with(data, tmp_path, 2, "not_finite", facts, *options)
    for rank in (0, 1):
        assert "its bytes have changed" in (told := ended.log(rank))
        assert f"{damaged} has the hash" in told
        assert "the rewind takes an older one" in told
    assert [event["to_step"] for event in ended.events("rewind")] == [4, 2]
    check_end(ended, 1, r"there is no checkpoint to go back to before step 2, whose weights were tried")


def test_a_rewind_passes_over_what_led_to_it(tmp_path):
    """The newest; but none of skipped steps, none that is damaged, none whose weights the last rewind tried in vain."""
    for step, skipped in ((2, 0), (4, 0), (6, 1)):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / "train_state.json").write_text(
            json.dumps({"step": step, "optimizer_step": 1, "progress": {"skipped_in_a_row": skipped}})
        )
        files = {"train_state.json": file_facts(folder / "train_state.json")}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    (tmp_path / "step-000005").mkdir()
    shutil.copytree(tmp_path / "step-000004", tmp_path / "step-000008")
    (tmp_path / "step-000008" / "train_state.json").write_text(
        (tmp_path / "step-000004" / "train_state.json").read_text().replace("4", "8")  # its hash is not that any more
    )
    found = [find_to_rewind(tmp_path, before) for before in (None, 4, 2)]
    assert [path and path.name for path in found] == ["step-000004", "step-000002", None]


def test_the_scale_of_fp16_is_what_a_process_begins_with(monkeypatch):
    """A run in fp16 needs a GPU; this is DeepSpeed's own scaler."""
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config

    monkeypatch.setattr(loss_scaler.dist, "get_rank", lambda: 0)
    arguments = DeepSpeedFP16Config(enabled=True, initial_scale_power=16).dynamic_loss_scale_args()
    scaler = loss_scaler.CreateLossScaler(torch.half, 0, True, arguments)
    begun = dict(vars(scaler))
    for _ in range(10):
        scaler.update_scale(True)
    assert scaler.loss_scale == 2.0**7, "the first is forgiven"
    optimizer = SimpleNamespace(loss_scaler=scaler)
    restart_loss_scale(SimpleNamespace(optimizer=optimizer, dynamic_loss_scale_args=lambda: arguments))
    assert vars(scaler) == begun


def begin_with(run, *, weights_of, data_of):
    """Leave one checkpoint in the copy of a run: the weights after one step, at the place in the data behind another,
    as it is planned anew."""
    weights = run / "checkpoints" / f"step-{weights_of:06d}"
    for path in set(step_folders(run / "checkpoints").values()) - {weights}:
        shutil.rmtree(path)
    loader = _state_before(open_past(run, data_of + 1), data_of + 1)
    state = json.loads((weights / "train_state.json").read_text())
    state["step"] = state["progress"]["step"] = data_of
    (weights / "train_state.json").write_text(json.dumps(state))
    (weights / "loader.json").write_text(json.dumps(loader.to_json()))
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest |= {"step": data_of, "data_digest": loader.digest()}
    manifest["files"] |= {name: file_facts(weights / name) for name in ("train_state.json", "loader.json")}
    (weights / "manifest.json").write_text(json.dumps(manifest))
    weights.rename(weights.with_name(f"step-{data_of:06d}"))


def finite_lines(run, first):
    lines = [row for row in merge_steps(read_metrics(run)) if row["step"] >= first]
    found = [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in lines]
    assert all(math.isfinite(value) for line in found for value in line)
    return found


def facts_at_end(run):
    """Of the last checkpoint: the digest of the data's order, and of each weight and each state of its own."""
    folder = find_latest(run / "checkpoints")
    assert folder is not None
    reader, digest = SliceReader(folder), hashlib.blake2b()
    kinds = {(name, kind) for name, kinds in reader.index["slices"].items() for kind in kinds}
    for name, kind in sorted(kinds):
        digest.update(f"{name}:{kind}".encode() + reader.read_full(name, kind).numpy().tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["data_digest"], manifest["step"], len(kinds), digest.hexdigest()
