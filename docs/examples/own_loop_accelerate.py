"""Trichord's loader in a loop of accelerate, on any number of processes, stopped and resumed.

    accelerate launch --num_processes 2 own_loop_accelerate.py "data/shard-*.tar" data/tokenizer state --steps 100

On CPUs `accelerate launch` starts one process, whatever it is asked for; several are started by torchrun:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 own_loop_accelerate.py ...

Called again with more steps, it goes on from the folder `state` with the next sample, also on another number of
processes. The loader is not prepared: it knows its rank, and its rows are shared out already.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trichord.batches.config import BatchesConfig
from trichord.batches.loader import ItemLengths, Loader, LoaderState
from trichord.samples.config import SamplesConfig
from trichord.shards.config import ShardsConfig


class NextToken(torch.nn.Module):
    """A stand-in for your model: guesses each token from the one before. Returns the sum of its labels' losses."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)

    def forward(self, batch):
        logits = self.table(batch.input_ids[batch.label_index])
        return torch.nn.functional.cross_entropy(logits, batch.labels[batch.label_index], reduction="sum")


def make_loader(shards: str, tokenizer: str, rank: int, world_size: int, saved: dict | None) -> Loader:
    return Loader(
        ShardsConfig.model_validate({"sources": [{"name": "web", "shards": shards}]}),
        SamplesConfig.model_validate({"image": {"size": 32}}),
        BatchesConfig(tokenizer=tokenizer, rows_per_step=4, row_tokens=64, num_workers=2),
        seed=1,
        lengths=ItemLengths(image=lambda width, height: (4, 4), audio=None),
        rank=rank,
        world_size=world_size,
        state=None if saved is None else LoaderState.from_json(saved),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("tokenizer")
    parser.add_argument("state", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    asked = parser.parse_args()
    accelerator = Accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes

    torch.manual_seed(0)
    model = NextToken(vocab_size=64)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    position, saved = asked.state / "loader.json", None
    if position.exists():
        accelerator.load_state(str(asked.state))
        saved = json.loads(position.read_text())

    with closing(make_loader(asked.shards, asked.tokenizer, rank, world_size, saved)) as loader:
        for batch in loader:
            labels = torch.tensor(float(sum(micro.num_labels for micro in batch.micro_batches)))
            labels = accelerator.reduce(labels.to(accelerator.device))  # the sum over all processes
            for micro in batch.micro_batches:
                loss = model(micro.to(accelerator.device)) / labels.clamp(min=1)
                accelerator.backward(loss * world_size)  # gradients come out divided by it
            optimizer.step()
            optimizer.zero_grad()
            if batch.state.step >= asked.steps:
                break
    states = gather_object([batch.state.to_json()])  # of the step that was taken, not of what was read ahead
    accelerator.save_state(str(asked.state))
    if accelerator.is_main_process:
        state = LoaderState.merge([LoaderState.from_json(state) for state in states])
        position.write_text(json.dumps(state.to_json()))
    accelerator.end_training()


if __name__ == "__main__":
    main()
