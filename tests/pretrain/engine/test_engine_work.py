"""FLOPs of a rank's steps: what is needed and what is executed, whatever the model does meanwhile."""

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fusion"))  # the hand-made batches
from tiny_trichord import OBJECTIVES, Item, tiny_batch, tiny_model

from trichord.engine import work as work_module
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.work import WorkMeter, blocks_again
from trichord.fusion.counts import Counts, executed_counts, useful_counts
from trichord.fusion.flops import flop_table, step_flops

BATCHES = [tiny_batch([Item(True, 3000, 5), Item(text=9, seed=1)]), tiny_batch([Item(audio=900, seed=2)])]


def meter(model, *, micro_batches: int = 1, contrastive=None, **engine: Any) -> WorkMeter:
    return WorkMeter(model, EngineConfig(**engine), contrastive, slots=4, micro_batches=micro_batches, world_size=2)


def test_steps_add_up_and_a_reading_starts_anew():
    model, twice = tiny_model(), meter(tiny_model())
    twice.add(BATCHES)
    twice.add(BATCHES)
    needed, executed = twice.read()
    table = flop_table(model)
    one = sum((useful_counts(batch, model) for batch in BATCHES), Counts())
    run = sum((executed_counts(batch, model) for batch in BATCHES), Counts())
    assert needed == pytest.approx(2 * sum(f.model for f in step_flops(table, one).values()))
    assert executed == pytest.approx(2 * sum(f.hardware for f in step_flops(table, run).values()))
    assert executed > needed
    assert twice.read() == (0.0, 0.0)


def test_a_room_that_thaws_costs_more():
    model = tiny_model()
    model.vision.requires_grad_(False)
    found = meter(model)
    found.add(BATCHES)
    frozen = found.read()
    model.vision.requires_grad_(True)
    found.add(BATCHES)
    thawed = found.read()
    assert thawed[0] > frozen[0]


def test_what_runs_twice_is_executed_but_not_needed():
    model = tiny_model()
    readings = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"contrastive": OBJECTIVES.contrastive},
        "accumulated": {"contrastive": OBJECTIVES.contrastive, "micro_batches": 2},
        "checkpointed": {"contrastive": OBJECTIVES.contrastive, "activation_checkpointing": "full"},
    }
    for name, options in kinds.items():
        found = meter(model, **options)
        found.add(BATCHES)
        readings[name] = found.read()
    assert {needed for needed, _ in readings.values()} == {readings["plain"][0]}
    assert readings["accumulated"][1] > readings["plain"][1]
    assert readings["checkpointed"][1] > readings["plain"][1]


def test_kinds_of_checkpointing():
    full: dict[str, Any] = {"activation_checkpointing": "full"}
    assert blocks_again(EngineConfig()) == blocks_again(EngineConfig(activation_checkpointing="selective")) == 0
    assert blocks_again(EngineConfig(**full)) == 1
    assert blocks_again(EngineConfig(**full, checkpoint_every_blocks=4)) == 0.25


def test_a_model_that_cannot_be_counted_warns_once_and_has_no_figure(monkeypatch):
    def fail(_):
        raise NotImplementedError("no meta kernel")

    monkeypatch.setattr(work_module, "flop_table", fail)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    work_module.log.addHandler(handler)
    found = meter(tiny_model())
    for _ in range(3):
        found.add(BATCHES)
        assert found.read() == (0.0, 0.0)
    work_module.log.removeHandler(handler)
    assert len(lines) == 1
    assert "no meta kernel" in lines[0]


def test_contrasts_of_ranks_that_share_rows_are_needed_once():
    """Two ranks at one row compute together what one rank with that row would: no batch here, similarities alone."""
    model = tiny_model()
    flops: dict[int, tuple[float, float]] = {}
    for size in (1, 2):
        engine = EngineConfig(sequence_parallel=size)
        slots = SlotLayout.of(4, size, 1).slots
        found = WorkMeter(model, engine, OBJECTIVES.contrastive, slots=slots, micro_batches=1, world_size=size)
        found.add([])
        needed, executed = found.read()
        flops[size] = needed * size, executed * size
    assert flops[1][0] > 0
    assert flops[2] == pytest.approx(flops[1])
