"""A real training loop whose state has a given size: one rank, ZeRO-1, AdamW, a trunk that is mostly embedding.

An embedding is state without much arithmetic, so that steps are short and a save spans several, as in a large run.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from trichord.batches.collate import collate
from trichord.batches.interleave import StreamPart
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.rows import RowFormat, build_row
from trichord.batches.windows import PlannedSample
from trichord.encoders.config import EncodersConfig
from trichord.engine.build import build_engine, start_process_group
from trichord.engine.config import EngineConfig
from trichord.engine.features import SlotLayout
from trichord.engine.step import Stepper
from trichord.fusion.config import FusionConfig
from trichord.fusion.model import build_model
from trichord.layers.config import LayersConfig
from trichord.objectives.config import ObjectivesConfig
from trichord.samples.config import SamplesConfig
from trichord.shards.lanes import SampleRef

HIDDEN_SIZE = 1024
ROW_TOKENS = 32
BYTES_PER_PARAMETER = 12  # the fp32 weight and Adam's two moments
_SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
_TRUNK = {"family": "llama", "hidden_size": HIDDEN_SIZE, "intermediate_size": 2048, "num_layers": 2, "num_heads": 8}


class TrainingLoop:
    """`run(n)` takes n optimizer steps on one batch and returns their seconds."""

    def __init__(self, state_gb: float):
        """Builds model and engine in this process. state_gb: 1e9 bytes of weights and moments, approximately."""
        engine_config = EngineConfig(zero_stage=1, precision="fp32")
        _, device = start_process_group(engine_config.timeout_s)
        objectives = ObjectivesConfig.model_validate({"next_token": {}})
        trunk = _TRUNK | {"num_kv_heads": 8}
        torch.manual_seed(0)
        model = build_model(
            EncodersConfig(),
            FusionConfig.model_validate({"trunk": trunk}),
            objectives,
            SamplesConfig(),
            LayersConfig(),
            _vocabulary(state_gb),
            _SPECIAL,
        )
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine: Any = build_engine(model, engine_config, micro_rows=1, grad_accum_steps=1)
        layout = SlotLayout(1, 1)
        self._stepper = Stepper(self.engine, objectives, device=device, layout=layout, max_grad_norm=1.0)
        self._batch = _text_batch()
        self.step = 0

    def run(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self._stepper.run([self._batch], {"samples": 1.0, "bad_samples": 0.0, "filtered": 0.0, "stop": 0.0})
            self.step += 1
        return time.perf_counter() - began


def _vocabulary(state_gb: float) -> int:
    """So many entries that weights and moments together are that large; the layers between are counted roughly."""
    layers = 2 * (4 * HIDDEN_SIZE**2 + 3 * HIDDEN_SIZE * 2048)
    wanted = state_gb * 1e9 / BYTES_PER_PARAMETER - layers
    return max(1024, int(wanted / HIDDEN_SIZE) + 1)


def _text_batch() -> PackedBatch:
    text = torch.arange(5, 5 + ROW_TOKENS - 2, dtype=torch.int32).numpy()
    parts = (StreamPart.text([1]), StreamPart.text(text, learned=True), StreamPart.text([2], learned=True))
    nothing = torch.zeros(0).numpy(), torch.zeros(0, dtype=torch.bool).numpy()
    planned = PlannedSample(SampleRef(0, 0, 0), "key", "x.tar", parts, (), 0, *nothing)
    form = RowFormat(ROW_TOKENS, 16, _SPECIAL["pad_id"], _SPECIAL["image_id"], _SPECIAL["audio_id"])
    return collate([build_row([planned], [[]], form)])
