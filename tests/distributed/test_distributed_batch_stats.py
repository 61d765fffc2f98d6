"""ResNet towers on several ranks: statistics of all ranks' real images, buffers equal everywhere and in checkpoints."""

import hashlib
import json
from pathlib import Path

import pytest
import tiny
import torch.distributed as dist
from ranks import run_ranks
from test_distributed_checkpoint import loader_state

from trichord.checkpoints import load, state
from trichord.checkpoints.config import CheckpointsConfig
from trichord.checkpoints.contents import ExpectedModel
from trichord.checkpoints.doctor import examine
from trichord.checkpoints.load import find_latest, load_into, load_weights
from trichord.checkpoints.save import CheckpointSaver
from trichord.checkpoints.slices import SliceReader
from trichord.encoders.config import VisionConfig
from trichord.engine import build
from trichord.engine.config import EngineConfig
from trichord.fusion.model import param_room
from trichord.layers.stored import stored_buffers, stored_tensors
from trichord.objectives.config import ObjectivesConfig

pytestmark = pytest.mark.distributed

STEPS = 4
LIMIT = 1e-5  # relative, fp32
RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "output_stride": 8}
CONVNEXT = {"depths": [1] * 4, "dims": [8] * 4, "output_stride": 8}
NEXT_TOKEN = ObjectivesConfig.model_validate({"next_token": {}})


def options(stage: int) -> dict:
    zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    rates = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.02, "max_grad_norm": 0.5}
    return {
        "zero_stage": stage,
        "precision": "fp32",
        "timeout_s": 60.0,
        "deepspeed": {"zero_optimization": zero},
    } | rates


def take_resnet(name: str = "resnet18", **changes) -> None:
    """Rank 1 of 2 still never has an image, and no rank has one in every micro-step."""
    vision = VisionConfig(name=name, options=RESNET if name == "resnet18" else CONVNEXT, **changes)
    tiny.ENCODERS = tiny.ENCODERS.model_copy(update={"vision": vision})


def digest(engine) -> str:
    buffers = stored_buffers(engine.module.model)
    assert buffers
    return hashlib.sha256(b"".join(buffer.numpy().tobytes() for buffer in buffers.values())).hexdigest()


def train(cases: list[tuple], objectives: ObjectivesConfig = tiny.OBJECTIVES) -> list:
    """Rank entry: (history, digest of the buffers) per (stage, micro_rows, recompute)."""
    take_resnet()
    found = []
    for stage, micro_rows, recompute in cases:
        config = EngineConfig(**options(stage))
        model = tiny.build_tiny(objectives)
        if recompute:
            model.enable_activation_checkpointing()
        facts, engine, stepper = tiny.make_stepper(config, micro_rows, objectives, model)
        history = tiny.train_steps(facts, engine, stepper, config, micro_rows, range(STEPS))
        found.append((history, digest(engine)))
        engine.destroy()
    return found


def difference(history: list[dict], reference: list[dict]) -> float:
    return max(
        abs(ours[name] - theirs[name]) / abs(theirs[name]) if theirs[name] else float(ours[name] != 0)
        for ours, theirs in zip(history, reference, strict=True)
        for name in theirs
    )


def test_every_split_of_a_micro_step_gives_the_same_losses_norms_and_buffers_on_all_ranks():
    """Accumulation 1: the 8 rows are one micro-step, on one rank or two, of which one has no image."""
    single, _ = run_ranks(1, train, [(0, 8, False)])[0][0]
    cases = [(0, 4, False), (1, 4, False), (2, 4, True), (3, 4, True)]
    by_rank = run_ranks(2, train, cases, timeout_s=280)
    assert by_rank[0] == by_rank[1], "a loss or a buffer differs between ranks"
    differences = {case: difference(history, single) for case, (history, _) in zip(cases, by_rank[0], strict=True)}
    print({case: f"{value:.1e}" for case, value in differences.items()})
    assert {case: value for case, value in differences.items() if not value <= LIMIT} == {}
    assert all(step["grad_norm"] > 0 and step["contrastive_image_text"] > 0 for step in single)


def test_two_passes_of_a_contrastive_step_move_the_buffers_once():
    """Accumulation 4, with and without the pass that only finds features: the towers see the same micro-steps."""
    first_step = {}
    for objectives in (tiny.OBJECTIVES, NEXT_TOKEN):
        by_rank = run_ranks(2, statistics_after_one_step, objectives)
        assert by_rank[0] == by_rank[1]
        first_step[objectives] = by_rank[0]
    with_contrast, without = first_step.values()
    assert with_contrast == without
    assert "over one of the 4 micro-steps" in with_contrast[1]


def statistics_after_one_step(objectives: ObjectivesConfig) -> tuple[str, str]:
    """Digest of the buffers, and what was warned of on rank 0."""
    take_resnet()
    config = EngineConfig(**options(1))
    said: list[str] = []
    build.log.warning = lambda text, *values: said.append(text % values)
    model = tiny.build_tiny(objectives)
    model.vision.load_state_dict(tiny.build_tiny(NEXT_TOKEN).vision.state_dict())
    facts, engine, stepper = tiny.make_stepper(config, 1, objectives, model)
    assert len(said) == (facts.rank == 0)
    tiny.train_steps(facts, engine, stepper, config, 1, range(1))
    warned: list = [said[0] if said else None]
    dist.broadcast_object_list(warned)
    return digest(engine), warned[0]


def train_and_save(folder: str, stage: int) -> tuple:
    take_resnet()
    config = EngineConfig(**options(stage))
    facts, engine, stepper = tiny.make_stepper(config, 4)
    tiny.train_steps(facts, engine, stepper, config, 4, range(2))
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
    saver.begin(engine, 2, {"progress": {}}, loader_state(2))
    kept = digest(engine)
    later = tiny.train_steps(facts, engine, stepper, config, 4, range(2, 4))
    assert digest(engine) != kept
    assert saver.finish()
    return kept, later, digest(engine)


def load_and_train(folder: str, stage: int, micro_rows: int) -> tuple:
    take_resnet()
    config = EngineConfig(**options(stage))
    facts, engine, stepper = tiny.make_stepper(config, micro_rows)
    load_into(engine, find_latest(Path(folder)))
    kept = digest(engine)
    return kept, tiny.train_steps(facts, engine, stepper, config, micro_rows, range(2, 4)), digest(engine)


@pytest.mark.parametrize(("stage", "other"), [(3, 1), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_a_checkpoint_holds_the_buffers_once_and_a_run_goes_on_from_it_bit_for_bit(tmp_path, monkeypatch, stage, other):
    written = run_ranks(2, train_and_save, str(tmp_path), stage)
    assert run_ranks(2, load_and_train, str(tmp_path), stage, 4) == written
    kept, later, _ = run_ranks(1, load_and_train, str(tmp_path), other, 8)[0]
    assert kept == written[0][0]
    assert difference(later, written[0][1]) <= LIMIT
    folder = find_latest(tmp_path)
    reader = SliceReader(folder)
    name = "vision.backbone.bn1.running_var"
    assert reader.index["slices"][name] == {"param": [[0, 64, "rank-00000.safetensors"]]}
    assert load_weights(folder)[name].min() > 0
    monkeypatch.setattr(tiny, "ENCODERS", tiny.ENCODERS)  # as it was, afterwards
    take_resnet()
    judge_statistics(folder, name)


def judge_statistics(folder: Path, name: str) -> None:
    """The doctor counts stored buffers as parts of the model, whole and when one is gone."""
    model = {name: tuple(tensor.shape) for name, tensor in stored_tensors(tiny.build_tiny()).items()}
    found = {finding.check: finding for finding in examine(folder, ExpectedModel(model, param_room))}
    assert {check for check, finding in found.items() if finding.verdict != "pass"} == {"training state"}, "no run's"
    index = json.loads((folder / "index.json").read_text())
    del index["params"][name], index["slices"][name]
    (folder / "index.json").write_text(json.dumps(index))
    found = {finding.check: finding for finding in examine(folder, ExpectedModel(model, param_room))}
    assert found["keys of vision"].detail.endswith(f"missing: {name}")
    assert f"{name}:param in rank-00000.safetensors is in no index" in found["slices"].detail


def test_a_checkpoint_from_before_buffers_were_stored_still_loads(tmp_path):
    run_ranks(1, save_and_load_without_buffers, str(tmp_path))


def save_and_load_without_buffers(folder: str) -> None:
    take_resnet()
    config = EngineConfig(**options(1))
    _, engine, _ = tiny.make_stepper(config, 8)
    saver = CheckpointSaver(Path(folder), CheckpointsConfig(), "a")
    stored, state.named_buffers = state.named_buffers, lambda engine: {}
    saver.begin(engine, 2, {"progress": {}}, loader_state(2))
    assert saver.finish()
    state.named_buffers = stored
    said: list[str] = []
    load.log.warning = lambda text, *values: said.append(text % values)
    before = digest(engine)
    load_into(engine, find_latest(Path(folder)))
    assert digest(engine) == before
    assert "holds no vision.backbone.bn1.running_mean and 23 more buffers" in said[0]


def test_norms_without_batches_give_the_same_on_any_accumulation():
    single = run_ranks(1, train_convnext, 8)[0]
    by_rank = run_ranks(2, train_convnext, 1)
    assert by_rank[0] == by_rank[1]
    assert difference(by_rank[0], single) <= LIMIT


def train_convnext(micro_rows: int) -> list[dict]:
    take_resnet("convnext_atto")
    config = EngineConfig(**options(2))
    facts, engine, stepper = tiny.make_stepper(config, micro_rows)
    return tiny.train_steps(facts, engine, stepper, config, micro_rows, range(3))
