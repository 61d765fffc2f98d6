"""Texts of real length spread: rows packed by the loader, against Hugging Face Trainer that pads each batch.

Trainer owns its loop, so our step is taken in its callbacks, before or after its own, in turn. Neither side's time
holds the reading of texts or their tokenization.
"""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from trichord.batches.tokenizer import load_tokenizer, train_tokenizer
from trichord.benchmarks.data_corpus import add_member
from trichord.benchmarks.packing import ragged_captions
from trichord.benchmarks.step import WARM_STEPS, StepRequest
from trichord.benchmarks.step_contestants import collect_batches, training_step, trunk_of
from trichord.config.run import RunConfig
from trichord.engine.build import start_process_group

_TEXTS = 2000
_ROWS = 2
_TEXT_TOKENS = 32  # useful ones of a text, about: Trainer's batch holds as many as the packed rows


def measure_ragged(request: StepRequest) -> dict[str, list[float]]:
    """CPU seconds per useful token of each step of a decoder of the same shape on the same texts, in one process."""
    folder = Path(request.folder)
    texts = _write_captions(folder / "captions")
    config = _packed_config(request)
    start_process_group(600.0)
    take = training_step(config, collect_batches(config))

    def packed(number: int) -> float:
        started = time.process_time()
        batch = take(number)
        return (time.process_time() - started) / sum(micro.useful_tokens for micro in batch.micro_batches)

    seconds: dict[str, list[float]] = {"packed": [], "trainer": []}
    _trainer(config, request, texts, packed, seconds).train()
    return {name: steps[WARM_STEPS:] for name, steps in seconds.items()}


def _write_captions(folder: Path) -> list[str]:
    texts = list(ragged_captions(_TEXTS, np.random.default_rng(7)))
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, "bpe", 4000, folder / "tokenizer")
    with tarfile.open(folder / "captions.tar", "w") as tar:
        for number, text in enumerate(texts):
            add_member(tar, f"{number:06d}.txt", text.encode())
    return texts


def _packed_config(request: StepRequest) -> RunConfig:
    folder = Path(request.folder)
    return RunConfig.model_validate(
        {
            "run": {"name": "packed", "root": str(folder), "max_steps": 10_000},
            "shards": {"sources": [{"name": "captions", "shards": str(folder / "captions" / "captions.tar")}]},
            "batches": {
                "tokenizer": str(folder / "captions" / "tokenizer"),
                "rows_per_step": _ROWS,
                "micro_rows": _ROWS,
                "row_tokens": request.row_tokens,
            },
            "fusion": {"kind": "interleave", "trunk": trunk_of(request)},
            "objectives": {"next_token": {}},
            "engine": {"zero_stage": 1, "precision": "fp32", "lr": 1e-4},
            "tracking": {"wandb": {"mode": "off"}},
        }
    )


def _trainer(
    config: RunConfig, request: StepRequest, texts: list[str], packed: Any, seconds: dict[str, list[float]]
) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    tokenizer = load_tokenizer(config.batches.tokenizer)
    torch.manual_seed(0)
    trunk = trunk_of(request)
    shape = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=trunk["hidden_size"],
        intermediate_size=trunk["intermediate_size"],
        num_hidden_layers=trunk["num_layers"],
        num_attention_heads=trunk["num_heads"],
        num_key_value_heads=trunk["num_kv_heads"],
    )
    special = tokenizer.special_ids
    rows = [[special["bos_id"], *tokenizer.encode(text), special["eos_id"]] for text in texts]
    arguments = TrainingArguments(
        output_dir=str(Path(config.run.root) / "trainer"),
        per_device_train_batch_size=_ROWS * request.row_tokens // _TEXT_TOKENS,
        max_steps=WARM_STEPS + request.pairs,
        learning_rate=config.engine.lr,
        max_grad_norm=config.engine.max_grad_norm,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    padder = _Padder(special["pad_id"])
    return Trainer(
        model=LlamaForCausalLM(shape),
        args=arguments,
        train_dataset=cast(Any, rows),  # a list is a map-style dataset
        data_collator=padder,
        callbacks=[_take_turns(packed, padder, seconds)],
    )


class _Padder:
    """Pads a batch to its longest text. `useful`: tokens of the batch that is trained on next."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id
        self.useful: list[int] = []

    def __call__(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        self.useful.append(sum(len(row) for row in rows))
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [self.pad_id] * (longest - len(row)) for row in rows])
        there = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": there, "labels": ids.masked_fill(there == 0, -100)}


def _take_turns(packed: Any, padder: _Padder, seconds: dict[str, list[float]]) -> Any:
    from transformers import TrainerCallback

    class TakeTurns(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % 2 == 0:
                seconds["packed"].append(packed(state.global_step))
            self.started = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            spent = time.process_time() - self.started
            done = len(seconds["trainer"])
            seconds["trainer"].append(spent / padder.useful[done])
            if len(seconds["packed"]) == done:
                seconds["packed"].append(packed(done))

    return TakeTurns()
