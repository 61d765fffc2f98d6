"""One checkpoint format for every ZeRO stage and world size, and a commit that a dying rank cannot fake."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks

from trichord.batches.loader_state import LaneCursor, LoaderState
from trichord.checkpoints import manifest as manifest_module
from trichord.checkpoints import save, snapshot
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.hashes import file_facts, hash_file
from trichord.checkpoints.load import find_latest, load_into, read_facts
from trichord.checkpoints.manifest import Manifest, incomplete_reason
from trichord.checkpoints.save import CheckpointSaver
from trichord.checkpoints.slices import SliceReader
from trichord.checkpoints.state import OwnedSlice, group_hyperparameters, optimizer_step, slices_to_fill
from trichord.core.errors import CheckpointError
from trichord.engine.config import EngineConfig
from trichord.shards.lanes import LanePlanner, LaneSource

pytestmark = pytest.mark.distributed

FIRST_STEPS = 4


def engine_config(stage: int, rates: dict | None = None) -> EngineConfig:
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    plain = {"zero_stage": stage, "precision": "fp32", "lr": 5e-3, "timeout_s": 60.0}
    return EngineConfig(**{**plain, **(rates or {})}, deepspeed={"zero_optimization": zero})


def loader_state(step: int) -> LoaderState:
    """The state of this rank's lanes, as a loader would hand it out."""
    planner = LanePlanner(0, [LaneSource([100])], num_lanes=tiny.ROWS, window_samples=8)
    lanes = range(dist.get_rank(), tiny.ROWS, dist.get_world_size())
    cursors = {lane: LaneCursor(planner.first_state(lane)) for lane in lanes}
    return LoaderState(step, cursors, {"num_lanes": tiny.ROWS})


def live_state(engine) -> dict:
    """Everything this rank holds: (name, kind) -> [(start, values)]."""
    pieces = {}
    for piece in slices_to_fill(engine):
        for kind, tensor in piece.tensors.items():
            pieces.setdefault((piece.name, kind), []).append((piece.start, tensor.detach().clone().float().numpy()))
    return {"pieces": pieces, "step": optimizer_step(engine), "groups": group_hyperparameters(engine)}


def whole(by_rank: list[dict]) -> dict:
    """(name, kind) -> whole flat array, from what all ranks hold; overlapping parts must agree."""
    parts = {}
    for state in by_rank:
        for key, pieces in state["pieces"].items():
            parts.setdefault(key, []).extend(pieces)
    arrays = {}
    for key, pieces in parts.items():
        array = np.full(max(start + len(values) for start, values in pieces), np.nan, dtype=np.float32)
        for start, values in pieces:
            overlap = array[start : start + len(values)]
            known = ~np.isnan(overlap)
            assert np.array_equal(overlap[known], values[known]), key
            array[start : start + len(values)] = values
        arrays[key] = array
    return arrays


def train_and_save(folder: str, stage: int, rates: dict | None = None):
    """Rank entry: some steps, a checkpoint, and three steps more to compare with."""
    config = engine_config(stage, rates)
    facts, engine, stepper = tiny.make_stepper(config, 1)
    tiny.train_steps(facts, engine, stepper, config, 1, range(FIRST_STEPS))
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
    saver.begin(engine, FIRST_STEPS, {"progress": {}}, loader_state(FIRST_STEPS))
    state = live_state(engine)
    later = tiny.train_steps(facts, engine, stepper, config, 1, range(FIRST_STEPS, FIRST_STEPS + 3))
    assert saver.finish()
    return state, later


def load_and_train(folder: str, stage: int, rates: dict | None = None):
    config = engine_config(stage, rates)
    facts, engine, stepper = tiny.make_stepper(config, 1)
    loaded = load_into(engine, find_latest(Path(folder)))
    assert loaded.step == FIRST_STEPS
    assert loaded.loader.is_merged
    state = live_state(engine)
    return state, tiny.train_steps(facts, engine, stepper, config, 1, range(FIRST_STEPS, FIRST_STEPS + 3))


@pytest.mark.parametrize(
    ("writer", "readers"),
    [
        ((2, 2), [(3, 3), (1, 0), (2, 2)]),
        pytest.param((3, 3), [(2, 1), (1, 3)], marks=pytest.mark.slow),
        pytest.param((2, 0), [(1, 2), (2, 3)], marks=pytest.mark.slow),
    ],
)
def test_any_split_loads_what_any_other_wrote(tmp_path, writer, readers):
    """(world size, stage): weights, moments, step and hyperparameters equal bit for bit; training goes on alike."""
    round_trip(tmp_path, writer, readers, {}, {"param", "exp_avg", "exp_avg_sq"})


@pytest.mark.parametrize(
    ("rates", "kinds", "step"),
    [
        ({"optimizer": "sgd"}, {"param", "momentum_buffer"}, 1),
        ({"optimizer": "rmsprop"}, {"param", "square_avg", "momentum_buffer"}, FIRST_STEPS),
        ({"rooms": {"vision": {"lr_ratio": 0.1, "layer_decay": 0.5}}}, {"param", "exp_avg", "exp_avg_sq"}, FIRST_STEPS),
    ],
    ids=["sgd", "rmsprop", "rates per room"],
)
def test_every_optimizer_and_rate_goes_on_from_a_checkpoint(tmp_path, rates, kinds, step):
    round_trip(tmp_path, (2, 2), [(1, 3)], rates, kinds, step)


def round_trip(folder, writer, readers, rates, kinds, step=FIRST_STEPS):
    world_size, stage = writer
    results = run_ranks(world_size, train_and_save, str(folder), stage, rates)
    written = whole([state for state, _ in results])
    assert {kind for _, kind in written} == kinds
    later = results[0][1]
    for world_size, stage in readers:
        loaded = run_ranks(world_size, load_and_train, str(folder), stage, rates)
        read = whole([state for state, _ in loaded])
        assert read.keys() == written.keys()
        for key, array in written.items():
            assert np.array_equal(read[key], array), (key, world_size, stage)
        for state, history in loaded:
            assert state["step"] == step
            assert state["groups"] == results[0][0]["groups"]
            for ours, theirs in zip(history, later, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5)


def save_twice(folder: str, victim: int, how: str):
    """The second save goes wrong on one rank, half-way through its file."""
    config = engine_config(1)
    facts, engine, stepper = tiny.make_stepper(config, 1)
    tiny.train_steps(facts, engine, stepper, config, 1, range(1))
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(commit_timeout_s=30), "a")
    saver.begin(engine, 1, {"progress": {}}, loader_state(1))
    assert saver.finish()
    if facts.rank == victim:
        save.write_hashed = lambda path, data: break_off(path, how)
    saver.begin(engine, 2, {"progress": {}}, loader_state(2))
    if how == "killed":
        saver.config = CheckpointsConfig(commit_timeout_s=3)
        saver._running.thread.join()
        while facts.rank == 0 and saver._running is not None:
            saver.poll()
        return None
    return saver.finish()


def break_off(path: Path, how: str):
    path.write_bytes(b"x" * 100)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_writes_leaves_the_previous_checkpoint(tmp_path, victim):
    with pytest.raises(RankError) as caught:
        run_ranks(2, save_twice, str(tmp_path), victim, "killed")
    assert caught.value.failures == {victim: "exit -9"}
    assert find_latest(tmp_path).name == "step-000001"
    assert (tmp_path / "latest").read_text().strip() == "step-000001"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_on_one_rank_abandons_the_save_on_all(tmp_path, victim):
    assert run_ranks(2, save_twice, str(tmp_path), victim, "disk full") == [False, False]
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-000001"]


def test_a_checkpoint_with_a_short_file_is_passed_over(tmp_path):
    run_ranks(1, save_twice_well, str(tmp_path))
    newest = tmp_path / "step-000002"
    file = newest / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "the manifest says" in incomplete_reason(newest)
    assert find_latest(tmp_path).name == "step-000001"


def save_twice_well(folder: str):
    config = engine_config(0)
    _, engine, _ = tiny.make_stepper(config, 8)
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
    for step in (1, 2):
        saver.begin(engine, step, {"progress": {}}, loader_state(step))
        assert saver.finish()


def save_often(folder: str):
    """Four saves with steps in between, as in a run: rank 0 commits while the others are elsewhere."""
    config = engine_config(2)
    facts, engine, stepper = tiny.make_stepper(config, 1)
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(keep_last=2), "a")
    committed = []
    for step in range(1, 9):
        tiny.train_steps(facts, engine, stepper, config, 1, range(step, step + 1))
        if step % 2 == 0:
            saver.begin(engine, step, {"progress": {}}, loader_state(step))
        committed.append(saver.poll())
    assert saver.finish()
    return [step for step in committed if step is not None]


def test_saves_in_a_row_on_two_ranks_keep_the_newest(tmp_path):
    by_rank = run_ranks(2, save_often, str(tmp_path))
    assert by_rank[0][:3] == [2, 4, 6], "rank 0 is told of each, also of those that the next save waited for"
    assert by_rank[1] == []
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000006", "step-000008"]


SLOWLY = ((0, "adamw"), (1, "adamw"), (2, "muon"), (3, "adamw"))


def save_slowly(folder: str):
    """The copy takes longer than everything else; the optimizer may not overtake it, at any stage."""
    by_stage = []
    snapshot_copy = snapshot.Snapshot.copy
    for stage, optimizer in SLOWLY:
        config = engine_config(stage, {"ema_decay": 0.9, "optimizer": optimizer})
        facts, engine, stepper = tiny.make_stepper(config, 8)
        tiny.train_steps(facts, engine, stepper, config, 8, range(2))
        saver = CheckpointSaver(Path(folder) / f"{stage} {optimizer}", CheckpointsConfig(), "a")
        snapshot.Snapshot.copy = lambda self: (time.sleep(1.0), snapshot_copy(self))
        saver.begin(engine, 2, {"progress": {}}, loader_state(2))
        at_save = live_state(engine)
        tiny.train_steps(facts, engine, stepper, config, 8, range(2, 4))
        snapshot.Snapshot.copy = snapshot_copy
        assert saver.finish()
        by_stage.append((at_save, live_state(engine)))
        engine.destroy()
    return by_stage


def test_the_optimizer_waits_for_the_copy_of_the_state(tmp_path):
    (by_stage,) = run_ranks(1, save_slowly, str(tmp_path))
    for (stage, optimizer), (at_save, after) in zip(SLOWLY, by_stage, strict=True):
        reader = SliceReader(find_latest(tmp_path / f"{stage} {optimizer}"))
        saved = {key: reader.read_full(*key).numpy().ravel() for key in at_save["pieces"]}
        for key, array in whole([at_save]).items():
            assert np.array_equal(saved[key], array), (stage, key)
        moved = [key for key, array in whole([after]).items() if not np.array_equal(saved[key], array)]
        assert {kind for _, kind in moved} == {kind for _, kind in saved} >= {"param", "ema"}, (stage, optimizer)


def test_what_the_forward_pass_changes_is_copied_before_it():
    statistics, weight = torch.ones(3), torch.ones(2)
    pieces = [
        OwnedSlice("norm.running_mean", (3,), None, 0, 3, {"param": statistics}),
        OwnedSlice("norm.weight", (2,), "decay", 0, 2, {"param": weight}),
    ]
    norm = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2)})
    engine = SimpleNamespace(module=SimpleNamespace(model=norm))
    image = snapshot.HostImage()
    taken = image.take(pieces, at_once=save._changed_by_forward(engine, pieces))
    statistics.fill_(7)
    taken.copy()
    taken.wait_copied()
    tensors = safetensors.torch.load(bytes(taken.image))
    assert tensors["norm.running_mean:param"].tolist() == [1, 1, 1]
    assert tensors["norm.weight:param"].tolist() == [1, 1]
    address = image._bytes.data_ptr()
    weight.fill_(5)
    again = image.take(pieces)
    again.copy()
    assert image._bytes.data_ptr() == address, "one block of memory, reused"
    assert safetensors.torch.load(bytes(again.image))["norm.weight:param"].tolist() == [5, 5]


def test_checkpoints_hashed_by_an_earlier_version_are_read(tmp_path):
    run_ranks(1, save_twice_well, str(tmp_path))
    newest = tmp_path / "step-000002"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert all(set(facts) == {"size", "blake3"} for facts in manifest["files"].values())
    for name, facts in manifest["files"].items():
        del facts["blake3"]
        facts["blake2b"] = hashlib.blake2b((newest / name).read_bytes(), digest_size=16).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    reader = SliceReader(newest)
    name = next(iter(reader.shapes))
    assert reader.read_full(name).numel() > 0
    del manifest["files"]["rank-00000.safetensors"]["blake2b"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no hash of rank-00000"):
        SliceReader(newest).read_full(name)


@pytest.mark.parametrize("key", ["step", "optimizer_step", "progress"])
def test_a_training_state_without_a_key_names_it(tmp_path, key):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    state = {"step": 1, "optimizer_step": 1, "progress": {}}
    del state[key]
    (folder / "train_state.json").write_text(json.dumps(state))
    files = {"train_state.json": file_facts(folder / "train_state.json")}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(CheckpointError, match=rf"train_state.json lacks {key}:"):
        read_facts(folder)


@pytest.mark.parametrize("gone", ["size", "blake3", "file"])
def test_a_manifest_without_its_facts_names_the_file(tmp_path, gone):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "train_state.json").write_text("{}")
    facts = file_facts(folder / "train_state.json")
    facts.pop(gone, None)
    files = {"train_state.json": None if gone == "file" else facts}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    if gone != "blake3":
        assert "of train_state.json" in incomplete_reason(folder)
        assert find_latest(tmp_path) is None
    ask = Manifest(folder).size if gone == "size" else Manifest(folder).verify
    with pytest.raises(CheckpointError, match=r"of train_state\.json"):
        ask("train_state.json")


def test_each_file_is_hashed_once_and_the_manifest_read_once(tmp_path, monkeypatch):
    run_ranks(1, save_twice_well, str(tmp_path))
    hashed, read = [], []
    monkeypatch.setattr(manifest_module, "hash_file", lambda path, kind: (hashed.append(path.name), hash_file(path))[1])
    read_json = manifest_module.read_json
    monkeypatch.setattr(manifest_module, "read_json", lambda path: (read.append(path.name), read_json(path))[1])
    reader = SliceReader(tmp_path / "step-000002")
    for name in reader.shapes:
        reader.read_full(name)
    assert sorted(hashed) == ["index.json", "rank-00000.safetensors"]
    assert read == ["manifest.json"]
