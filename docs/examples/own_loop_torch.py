"""Trichord's loader in a loop of plain torch, on any number of processes, stopped and resumed.

    torchrun --nproc-per-node 2 own_loop_torch.py "data/shard-*.tar" data/tokenizer state.pt --steps 100

Called again with more steps, it goes on from state.pt with the next sample, also on another number of processes.
"""

import argparse
import os
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

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


def merged(own: LoaderState, world_size: int) -> dict:
    """The state of all ranks, as JSON: what a job of any size goes on from."""
    states = [own.to_json()] * world_size
    if world_size > 1:
        dist.all_gather_object(states, own.to_json())
    return LoaderState.merge([LoaderState.from_json(state) for state in states]).to_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards")
    parser.add_argument("tokenizer")
    parser.add_argument("state", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    asked = parser.parse_args()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
    if world_size > 1:
        dist.init_process_group("gloo")  # "nccl" on GPUs
    rank = dist.get_rank() if world_size > 1 else 0

    torch.manual_seed(0)
    model = NextToken(vocab_size=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    saved = torch.load(asked.state, weights_only=True) if asked.state.exists() else None
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    trained = DistributedDataParallel(model) if world_size > 1 else model

    with closing(make_loader(asked.shards, asked.tokenizer, rank, world_size, saved and saved["loader"])) as loader:
        for batch in loader:
            labels = torch.tensor(float(sum(micro.num_labels for micro in batch.micro_batches)))
            if world_size > 1:
                dist.all_reduce(labels)  # of all ranks: then the gradient does not depend on how many there are
            for micro in batch.micro_batches:
                loss = trained(micro) / labels.clamp(min=1)
                (loss * world_size).backward()  # DistributedDataParallel divides by it
            optimizer.step()
            optimizer.zero_grad()
            if batch.state.step >= asked.steps:
                break
        state = merged(batch.state, world_size)  # of the step that was taken, not of what was read ahead
    if rank == 0:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": state}
        torch.save(parts, asked.state.with_suffix(".new"))
        asked.state.with_suffix(".new").replace(asked.state)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
