"""What is planned: a run's model and data, looked at once; everything after this is arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch

from trichord.batches.config import BatchesConfig
from trichord.batches.tokenizer import load_tokenizer
from trichord.checkpoints.config import CheckpointsConfig
from trichord.core.errors import ConfigError
from trichord.engine.config import EngineConfig
from trichord.fusion.config import FusionConfig
from trichord.fusion.counts import Counts, executed_counts, useful_counts
from trichord.fusion.flops import Piece, flop_table
from trichord.fusion.model import ROOMS, Trichord, build_model
from trichord.layers.config import LayersConfig
from trichord.layers.recompute import Recompute
from trichord.objectives.config import ObjectivesConfig
from trichord.planning.alike import Trace
from trichord.planning.comms import TOWERS
from trichord.planning.trace import Rule, ShapeModel
from trichord.planning.typical import RowMaker
from trichord.planning.workload import DataOfRun, SourceLoad, Workload
from trichord.planning.zero import Parameter, parameters_of
from trichord_kernels.dispatch import HAS_TRITON

# Qwen3's; among the vocabularies in common use a large one, so that a plan without a tokenizer errs on the safe side.
_ASSUMED_VOCAB_SIZE = 151_936
_ASSUMED_IDS = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
_TRACED_ROWS = 2  # rows of a micro-batch are independent of each other: what two of them keep is twice what one keeps


class RunToPlan(DataOfRun, Protocol):
    """What a plan reads of a `RunConfig`: the run's identity and the leaves of the rooms."""

    @property
    def run(self) -> Any: ...
    @property
    def batches(self) -> BatchesConfig: ...
    @property
    def layers(self) -> LayersConfig: ...
    @property
    def fusion(self) -> FusionConfig: ...
    @property
    def objectives(self) -> ObjectivesConfig: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def checkpoints(self) -> CheckpointsConfig: ...


@dataclass(frozen=True)
class RowLoad:
    """Of one row in a micro-batch, on one of the ranks that share it. saved: room -> bytes of activations kept for the
    backward pass; block: bytes of the largest block's (0 where nothing is recomputed); moved, moved_by_towers: bytes
    that a forward pass reads and writes outside of products and attention; sent: kind of exchange with those ranks ->
    bytes put in. launches: kernels of a forward pass, and messages of each kind, however many rows."""

    saved: dict[str, float]
    block: float
    moved: float
    moved_by_towers: float
    launches: int
    sent: dict[str, float] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.saved.values())


class Subject:
    """The model on the meta device, and typical rows. Properties are computed when asked for, and kept."""

    def __init__(self, config: RunToPlan, workload: Workload, vocab_size: int | None = None):
        """Raises ConfigError: the model cannot be built from the config, or no sample fits into a row."""
        self.config = config
        self.workload = workload
        self.vocab_size, self.special, self.vocab_note = find_vocabulary(config.batches.tokenizer, vocab_size)
        self.rule: Rule = "triton" if HAS_TRITON else "reference"
        self.model = self._build()
        self.parameters: list[Parameter] = parameters_of(self.model)
        self.flops: list[Piece] = flop_table(self.model)
        self._rows = RowMaker(config.batches, config.samples, config.encoders, config.fusion, self.special)
        self._batch = self._rows.batch(workload, _TRACED_ROWS)
        self._shapes = ShapeModel(self.model, half=config.engine.precision in ("bf16", "fp16"))
        self._traces: dict[tuple[str, int], Trace] = {}
        self.kept: dict[Any, Any] = {}
        """What follows from a layout, by that layout: a search asks for it again and again."""

    @property
    def learns(self) -> bool:
        return any(p.trainable for p in self.parameters)

    @cached_property
    def executed(self) -> Counts:
        """What runs per row, slack and padding included."""
        return executed_counts(self._batch, self.model) * (1 / _TRACED_ROWS)

    @cached_property
    def useful(self) -> Counts:
        """What a row asks for."""
        return useful_counts(self._batch, self.model) * (1 / _TRACED_ROWS)

    def load(self, mode: Recompute, shared: int = 1) -> RowLoad:
        """Of a row under a kind of activation checkpointing, where so many ranks share it."""
        if (mode, shared) not in self.kept:
            self.kept[mode, shared] = self._load(mode, shared)
        return self.kept[mode, shared]

    def _load(self, mode: Recompute, shared: int) -> RowLoad:
        rows = self._rows_to_trace(shared)
        batch = self._batch if rows == _TRACED_ROWS else self._rows.batch(self.workload, rows)
        if ("none", shared) not in self._traces:
            self._traces["none", shared] = self._trace("none", batch, shared)
        plain = self._traces["none", shared]
        trace = plain if mode == "none" else self._trace(mode, batch, shared)
        towers = sum(plain.moved.get(room, 0) for room in TOWERS)
        return RowLoad(
            saved={room: size / rows for room, size in trace.saved.items()},
            # With every block kept there is none to recompute.
            block=0.0 if mode == "none" else max(plain.blocks.values(), default=0) / rows,
            moved=sum(plain.moved.values()) / rows + self._logit_bytes / shared,
            moved_by_towers=towers / rows,
            launches=plain.launches,
            sent={kind: size / rows for kind, size in plain.sent.items()},
            messages=plain.messages,
        )

    def _rows_to_trace(self, shared: int) -> int:
        """As few as their tokens can be shared out."""
        divides = _TRACED_ROWS * self.config.batches.row_tokens % shared == 0
        return _TRACED_ROWS if divides else shared

    @cached_property
    def heaviest(self) -> tuple[str, float]:
        """The source whose rows keep the most, and how many times a typical row's activations that is, at least 1."""
        typical = self.load("none").total
        found = ("", 1.0)
        for source in self._different_sources():
            alone = Workload((replace(source, share=1.0),), ())
            ratio = self._trace("none", self._rows.batch(alone, 1)).total / typical
            found = max(found, (source.name, ratio), key=lambda pair: pair[1])
        return found

    def count_parameters(self) -> dict[str, dict[str, int]]:
        """Room of the model -> {"trainable", "frozen"}; tied weights count once."""
        counts = {room: {"trainable": 0, "frozen": 0} for room in ROOMS}
        for parameter in self.parameters:
            counts[parameter.room]["trainable" if parameter.trainable else "frozen"] += parameter.numel
        return {room: count for room, count in counts.items() if any(count.values())}

    def _different_sources(self) -> list[SourceLoad]:
        """Of sources with the same samples one."""
        alike = {(s.images, s.clips, s.clip_seconds, s.text_tokens): s for s in self.workload.sources}
        return list(alike.values()) if len(alike) > 1 else []

    @property
    def _logit_bytes(self) -> float:
        """Logits of a row, written and read once in the forward pass (and twice that in the backward pass)."""
        trunk = self.model.trunk
        if trunk is None:
            return 0.0
        return (
            2 * self.executed.labels * trunk.lm_head.out_features * (4 if self.config.engine.precision == "fp32" else 2)
        )

    def _trace(self, mode: Recompute, batch: Any, shared: int = 1) -> Trace:
        engine = self.config.engine
        autocast = engine.precision == "autocast_bf16"
        options = {"autocast": autocast, "recompute": mode, "every": engine.checkpoint_every_blocks}
        return self._shapes.trace(batch, self.rule, **options, shared=shared)

    def _build(self) -> Trichord:
        config = self.config
        with torch.device("meta"):
            return build_model(
                config.encoders,
                config.fusion,
                config.objectives,
                config.samples,
                config.layers,
                self.vocab_size,
                self.special,
            )


def find_vocabulary(tokenizer: str, vocab_size: int | None) -> tuple[int, Mapping[str, int], str]:
    """(size, special ids, how we know)."""
    if vocab_size is not None:
        return vocab_size, _ASSUMED_IDS, f"vocabulary of {vocab_size:,} as given"
    try:
        loaded = load_tokenizer(tokenizer)
    except ConfigError:
        note = f"tokenizer {tokenizer} is not here: a vocabulary of {_ASSUMED_VOCAB_SIZE:,} is assumed"
        return _ASSUMED_VOCAB_SIZE, _ASSUMED_IDS, note
    return loaded.vocab_size, loaded.special_ids, f"vocabulary of {loaded.vocab_size:,} from tokenizer {tokenizer}"
