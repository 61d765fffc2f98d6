"""Six small runs of different kinds, for comparing what `trichord plan` predicts with what is measured.

Large enough that what is counted is not rounding: 1 to 3 million parameters, 256 tokens a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trichord.batches.collate import collate
from trichord.batches.packed_batch import PackedBatch
from trichord.batches.packing import pack_rows
from trichord.config.run import RunConfig
from trichord.fusion.model import Trichord, build_model
from trichord.planning.typical import RowMaker
from trichord.planning.workload import SourceLoad, Spread, Workload

WINDOW = 64  # samples that are packed together
SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "image_id": 3, "audio_id": 4}
VOCAB = 2048

VISION = {"name": "vit_tiny_patch16_224", "options": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4}}
AUDIO = {"mel": {"n_mels": 40}, "hidden_size": 96, "num_layers": 3, "num_heads": 4, "stride": 4}
WHISPER = {"kind": "whisper", "mel": {"n_mels": 40}, "hidden_size": 96, "num_layers": 3, "num_heads": 4}
TEXT = {"kind": "transformer", "hidden_size": 96, "num_layers": 3, "num_heads": 4, "max_tokens": 64}
LLAMA = {
    "family": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
}
QWEN = {**LLAMA, "family": "qwen3", "head_dim": 32, "tie_word_embeddings": False}

KINDS: dict[str, dict[str, Any]] = {
    "towers": {
        "encoders": {"vision": VISION, "text": TEXT},
        "fusion": {"kind": "none"},
        "objectives": {"contrastive": {"pairs": ["image-text"], "embed_dim": 64}},
    },
    "trunk": {"fusion": {"trunk": {**LLAMA, "num_layers": 6}}, "objectives": {"next_token": {}}},
    "vision": {"encoders": {"vision": VISION}, "fusion": {"trunk": QWEN}, "objectives": {"next_token": {}}},
    "audio": {"encoders": {"audio": WHISPER}, "fusion": {"trunk": LLAMA}, "objectives": {"next_token": {}}},
    "all": {
        "encoders": {"vision": VISION, "audio": AUDIO, "text": TEXT},
        "fusion": {"trunk": LLAMA},
        "objectives": {"next_token": {}, "contrastive": {"embed_dim": 64}},
    },
    "frozen": {
        "encoders": {"vision": {**VISION, "freeze": True}, "audio": WHISPER},
        "fusion": {"trunk": QWEN},
        "objectives": {"next_token": {}},
        "recompute": True,
    },
}

SOURCES = {
    "towers": ("image-text",),
    "trunk": ("text",),
    "vision": ("image-text", "text"),
    "audio": ("speech",),
    "all": ("image-text", "speech", "all"),
    "frozen": ("all", "text"),
}
SECONDS = Spread.of_values([0.3 + 0.05 * i for i in range(20)])
CAPTION, DOCUMENT = Spread.of_values(list(range(8, 40))), Spread.of_values(list(range(40, 200, 5)))


def load_of(name: str, share: float) -> SourceLoad:
    """image-text: a picture and a caption; speech: a clip and its words; all: all three; text: documents."""
    has_image, has_clip = name in ("image-text", "all"), name in ("speech", "all")
    return SourceLoad(name, share, has_image, has_clip, SECONDS, DOCUMENT if name == "text" else CAPTION)


def workload(kind: str) -> Workload:
    names = SOURCES[kind]
    return Workload(tuple(load_of(name, 1 / len(names)) for name in names), ("made up",))


def config_of(kind: str, micro_rows: int = 2, row_tokens: int = 256, **engine: Any) -> RunConfig:
    leaves = {key: value for key, value in KINDS[kind].items() if key != "recompute"}
    return RunConfig.model_validate(
        {
            "run": {"name": kind, "max_steps": 10},
            "shards": {"sources": [{"name": name, "shards": "x.tar"} for name in SOURCES[kind]]},
            "samples": {"image": {"size": 32}, "audio": {"max_seconds": 2}},
            "batches": {
                "tokenizer": "nowhere",
                "rows_per_step": 8,
                "micro_rows": micro_rows,
                "row_tokens": row_tokens,
                "max_samples_per_row": 16,
            },
            "engine": {"precision": "fp32", "zero_stage": 0, "timeout_s": 60.0, **recompute_of(kind), **engine},
            **leaves,
        }
    )


def recompute_of(kind: str) -> dict[str, Any]:
    return {"activation_checkpointing": "full"} if KINDS[kind].get("recompute") else {}


def build(config: RunConfig) -> Trichord:
    leaves = config.encoders, config.fusion, config.objectives, config.samples, config.layers
    return build_model(*leaves, VOCAB, SPECIAL)


def build_shapes(config: RunConfig) -> Trichord:
    with torch.device("meta"):
        return build(config)


def row_maker(config: RunConfig) -> RowMaker:
    return RowMaker(config.batches, config.samples, config.encoders, config.fusion, SPECIAL)


def typical_batches(config: RunConfig, count: int) -> list[PackedBatch]:
    """Micro-batches of one rank, one after the other out of one stream of rows."""
    rows = row_maker(config).rows(workload(config.run.name))
    return [collate([next(rows) for _ in range(config.batches.micro_rows)]) for _ in range(count)]


def drawn_batches(config: RunConfig, count: int, seed: int) -> list[PackedBatch]:
    """Micro-batches of random samples of the same sources, packed as the loader packs a window: what training would see
    where the plan sees only means and quantiles. A window's emptiest row goes into the next window, so it is left out.
    """
    rng = np.random.default_rng(seed)
    sources, maker = workload(config.run.name).sources, row_maker(config)
    needed = count * config.batches.micro_rows
    samples = []
    while len(samples) < WINDOW or sum(map(length_of, samples)) < 2 * needed * config.batches.row_tokens:
        source = sources[len(samples) % len(sources)]  # mixtures deal sources evenly, not at random
        if (sample := maker.sample(source, 0, place=rng.random())) is not None:
            samples.append(sample)
    packed = pack_rows([*map(length_of, samples)], config.batches.row_tokens, config.batches.max_samples_per_row)
    emptiest = min(packed, key=lambda items: sum(length_of(samples[i]) for i in items))
    packed.remove(emptiest)
    rng.shuffle(packed)
    rows = [maker.row([samples[i] for i in items]) for items in packed[:needed]]
    return [collate(rows[i : i + config.batches.micro_rows]) for i in range(0, needed, config.batches.micro_rows)]


def length_of(sample: tuple) -> int:
    return sum(part.length for part in sample[0])
