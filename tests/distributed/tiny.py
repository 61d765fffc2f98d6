"""A tiny tri-modal model and hand-made global batches, for cases that compare splits of the same step.

Global batch: `ROWS` rows. With 2 ranks rank 1 never has an image, and rank 0 has audio only at odd steps.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from trichord.batches.collate import collate
from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import DecodedClip, RowArrays, RowFormat, build_row
from trichord.batches.windows import PlannedSample
from trichord.encoders.config import EncodersConfig
from trichord.encoders.lengths import audio_tokens, image_grid
from trichord.engine.build import build_engine, set_rates, start_process_group
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.sequence import data_place
from trichord.engine.step import Stepper
from trichord.fusion.config import FusionConfig
from trichord.fusion.model import Trichord, build_model
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ObjectivesConfig
from trichord.samples.config import SamplesConfig
from trichord.shards.lanes import SampleRef

ROWS = 8
ROW_TOKENS = 48
MAX_SAMPLES = 4
IMAGE_SIZE = 16
SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
VOCAB = 32


class Ids:
    """The ids of a tokenizer, for `build_row`."""

    pad_id, bos_id, eos_id, image_id, audio_id = (
        SPECIAL[n] for n in ("pad_id", "bos_id", "eos_id", "image_id", "audio_id")
    )


ENCODERS = EncodersConfig.model_validate(
    {
        "vision": {
            "name": "vit_tiny_patch16_224",
            "options": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False},
        },
        "audio": {"mel": {"n_mels": 8}, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "stride": 4},
        "text": {"kind": "mean", "hidden_size": 16},
    }
)
FUSION = FusionConfig.model_validate(
    {
        "trunk": {
            "family": "llama",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
        }
    }
)
OBJECTIVES = ObjectivesConfig.model_validate({"next_token": {}, "contrastive": {"embed_dim": 8}})
SAMPLES = SamplesConfig.model_validate({"image": {"size": IMAGE_SIZE}})


def build_tiny(objectives: ObjectivesConfig = OBJECTIVES, **trunk) -> Trichord:
    """trunk: keys of the trunk's config that are to be others than in `FUSION`."""
    torch.manual_seed(0)
    fusion = FUSION.model_copy(update={"trunk": FUSION.trunk.model_copy(update=trunk)})
    encoders = ENCODERS if objectives.contrastive else ENCODERS.model_copy(update={"text": None})
    return build_model(encoders, fusion, objectives, SAMPLES, LayersConfig(), VOCAB, SPECIAL)


def make_row(row: int, step: int) -> RowArrays:
    """Even rows: images with text, at odd steps 2 with audio too. Odd rows: clips and text. Counts and lengths vary."""
    rng = np.random.default_rng([row, step])
    planned, decoded = [], []
    for _ in range(1 + (row + step) % 2):
        text = rng.integers(5, VOCAB, size=rng.integers(1, 5)).astype(np.int32)
        parts, items = [StreamPart.text([Ids.bos_id])], []
        if row % 2 == 0:
            parts.append(StreamPart.image(image_grid(ENCODERS.vision, IMAGE_SIZE)))
            items.append(rng.integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))
        if row % 2 == 1 or (row == 2 and step % 2 == 1):
            waveform = rng.integers(-9000, 9000, size=rng.integers(800, 2000)).astype(np.int16)
            parts.append(StreamPart.audio(audio_tokens(ENCODERS.audio, len(waveform))))
            items.append(DecodedClip(len(waveform), waveform=waveform))
        parts.append(StreamPart.text(text, learned=True, caption=True))
        parts.append(StreamPart.text([Ids.eos_id], learned=True))
        nothing = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool)
        group = int(rng.integers(3))
        planned.append(PlannedSample(SampleRef(0, 0, row), "key", "x.tar", tuple(parts), (), group, *nothing))
        decoded.append(items)
    return build_row(planned, decoded, FORM)


FORM = RowFormat(ROW_TOKENS, IMAGE_SIZE, Ids.pad_id, Ids.image_id, Ids.audio_id)


def micro_batches(step: int, rank: int, world_size: int, micro_rows: int, rows: int = ROWS) -> list[PackedBatch]:
    """The rank's rows of global batch `step`: row r goes to rank r % world_size."""
    own = list(range(rank, rows, world_size))
    count = math.ceil(rows / (world_size * micro_rows))
    empty = build_row([], [], FORM)
    made = [make_row(row, step) for row in own] + [empty] * (count * micro_rows - len(own))
    return [collate(made[i : i + micro_rows]) for i in range(0, count * micro_rows, micro_rows)]


def make_stepper(
    engine_config: EngineConfig,
    micro_rows: int,
    objectives: ObjectivesConfig = OBJECTIVES,
    model=None,
    rows: int = ROWS,
):
    facts, device = start_process_group(engine_config.timeout_s)
    place = data_place(engine_config, facts)
    count = math.ceil(rows / (place.world_size * micro_rows))
    engine = build_engine(model or build_tiny(objectives), engine_config, micro_rows=micro_rows, grad_accum_steps=count)
    layout = SlotLayout.of(micro_rows * MAX_SAMPLES, place.size, count)
    stepper = Stepper(engine, objectives, device=device, layout=layout, max_grad_norm=engine_config.max_grad_norm)
    return facts, engine, stepper


def train_steps(
    facts, engine, stepper: Stepper, engine_config: EngineConfig, micro_rows: int, steps: range, rows: int = ROWS
):
    """Global losses and gradient norms of the steps."""
    history = []
    for step in steps:
        set_rates(engine, engine_config, 0, 1)
        place = data_place(engine_config, facts)
        whole = micro_batches(step, place.rank, place.world_size, micro_rows, rows)
        batches = [batch.shared(place.place, place.size) for batch in whole]
        result = stepper.run(batches, {"samples": 0.0, "bad_samples": 0.0, "filtered": 0.0, "stop": 0.0})
        names = sorted(result.losses)
        losses = torch.stack([result.losses[name] for name in names])
        dist.all_reduce(losses)
        history.append({**dict(zip(names, losses.tolist())), "grad_norm": result.grad_norm})
    return history


def train_cases(cases: list[tuple[dict, int]], steps: int, rows: int = ROWS, **model):
    """Entry point of a rank: one history per (engine options, micro_rows), in one process as starting costs most.

    model: for `build_tiny`."""
    histories = []
    for engine_options, micro_rows in cases:
        config = EngineConfig(**engine_options)
        facts, engine, stepper = make_stepper(config, micro_rows, model=build_tiny(**model), rows=rows)
        histories.append(train_steps(facts, engine, stepper, config, micro_rows, range(steps), rows))
        engine.destroy()
    return histories
