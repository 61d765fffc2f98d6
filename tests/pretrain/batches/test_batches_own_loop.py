"""The example of docs/data/own-loop.md, run as it stands there: on one process and on two, stopped and resumed."""

import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from batches_corpus import image_bytes, text_bytes, write_shards

from trichord.batches.tokenizer import train_tokenizer

DOCUMENT = Path(__file__).parents[3] / "docs" / "data" / "own-loop.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The names that the document defines, with its data in place."""
    import numpy as np

    root = tmp_path_factory.mktemp("own_loop")
    rng = np.random.default_rng(0)
    pairs = [(f"k{number:03d}", {"png": image_bytes(rng), "txt": text_bytes(rng)}) for number in range(60)]
    write_shards(root / "shards", pairs, per_shard=20)
    train_tokenizer([members["txt"].decode() for _, members in pairs], "word", 64, root / "tokenizer")
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    code = "\n".join(blocks).replace("data/shard-*", f"{root}/shards/part-*").replace("data/tok", f"{root}/tok")
    names: dict = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names


class Model(torch.nn.Module):
    """Predicts the next token from the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(64, 64)

    def forward(self, batch):
        at = batch.label_index
        logits = self.table(batch.input_ids[at])
        return torch.nn.functional.cross_entropy(logits, batch.labels[at], reduction="sum")


def weights_after(example, stops):
    """Train in stretches, each in a new loader from the state that the one before left."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    saved = None
    for steps in stops:
        with closing(example["make_loader"](0, 1, saved)) as loader:
            saved = example["merged_state"](example["train"](model, optimizer, loader, steps))
    return model.table.weight.detach(), saved


def test_the_example_learns_and_a_stop_changes_nothing(example):
    whole, state = weights_after(example, [6])
    stopped, state_after_stops = weights_after(example, [2, 3, 1])
    assert (state["step"], state["digest"]) == (6, state_after_stops["digest"])
    assert torch.equal(whole, stopped)
    assert not torch.equal(whole, Model().table.weight)


def test_two_ranks_of_the_example_hold_the_same_step(example):
    parts = []
    for rank in range(2):
        with closing(example["make_loader"](rank, 2, None)) as loader:
            parts.append(next(iter(loader)))
    with closing(example["make_loader"](0, 1, None)) as loader:
        whole = next(iter(loader))
    labels = [sum(micro.num_labels for micro in step.micro_batches) for step in (*parts, whole)]
    assert labels[0] + labels[1] == labels[2] > 0
    merged = type(parts[0].state).merge([part.state for part in parts])
    assert merged.digest() == whole.state.digest()
