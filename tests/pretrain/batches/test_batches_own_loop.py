"""docs/examples: the loader in loops of plain torch and of accelerate, run as they stand there, stopped and resumed on
another number of processes; and what is said of loops that would hand out samples twice."""

import json
import os
import runpy
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from batches_corpus import image_bytes, text_bytes, write_shards
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset

from trichord.batches import own_loop
from trichord.batches.tokenizer import train_tokenizer

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
TORCH, ACCELERATE = EXAMPLES / "own_loop_torch.py", EXAMPLES / "own_loop_accelerate.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(pattern of the shards, folder of the tokenizer)."""
    root = tmp_path_factory.mktemp("own_loop")
    rng = np.random.default_rng(0)
    pairs = [(f"k{number:03d}", {"png": image_bytes(rng), "txt": text_bytes(rng)}) for number in range(60)]
    write_shards(root / "shards", pairs, per_shard=20)
    train_tokenizer([members["txt"].decode() for _, members in pairs], "word", 64, root / "tokenizer")
    return f"{root}/shards/part-*.tar", str(root / "tokenizer")


@pytest.fixture
def run_here(data, monkeypatch):
    """An example in this process, as the only one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(example: Path, state: Path, steps: int) -> None:
        monkeypatch.setattr(sys, "argv", [str(example), *data, str(state), "--steps", str(steps)])
        try:
            runpy.run_path(str(example), run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    return run


def result(state: Path) -> tuple[torch.Tensor, dict]:
    """Weights and position that an example has left."""
    if state.is_dir():
        return load_file(state / "model.safetensors")["table.weight"], json.loads((state / "loader.json").read_text())
    saved = torch.load(state, weights_only=True)
    return saved["model"]["table.weight"], saved["loader"]


def test_a_stop_changes_nothing_and_the_example_learns(run_here, tmp_path):
    run_here(TORCH, tmp_path / "whole.pt", 6)
    for steps in (2, 5, 6):
        run_here(TORCH, tmp_path / "stops.pt", steps)
    (whole, position), (stopped, position_after_stops) = result(tmp_path / "whole.pt"), result(tmp_path / "stops.pt")
    assert (position["step"], position["digest"]) == (6, position_after_stops["digest"])
    assert torch.equal(whole, stopped)
    torch.manual_seed(0)
    assert not torch.allclose(whole, torch.nn.Embedding(64, 64).weight, atol=0.1)


BOTH = """
import runpy, sys
import torch.distributed as dist
torch_example, accelerate_example, torch_state, accelerate_state, *data = sys.argv[1:]
end, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the second takes over the group
sys.argv = [torch_example, *data, torch_state, "--steps", "3"]
runpy.run_path(torch_example, run_name="__main__")
dist.destroy_process_group = end
sys.argv = [accelerate_example, *data, accelerate_state, "--steps", "3"]
runpy.run_path(accelerate_example, run_name="__main__")
"""


@pytest.mark.distributed
def test_two_processes_take_the_steps_of_one_and_one_goes_on_from_them(run_here, data, tmp_path):
    """Both examples in the same two processes, one after the other: starting torch is what takes the time."""
    (tmp_path / "both.py").write_text(BOTH)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    states = [tmp_path / "torch.pt", tmp_path / "accelerate"]
    arguments = [tmp_path / "both.py", TORCH, ACCELERATE, *states, *data]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *map(str, arguments)], check=True, env=environment, timeout=200)
    run_here(TORCH, tmp_path / "one.pt", 5)
    expected, expected_position = result(tmp_path / "one.pt")
    for example, state in zip((TORCH, ACCELERATE), states):
        run_here(example, state, 5)
        weights, position = result(state)
        assert (position["step"], position["digest"]) == (5, expected_position["digest"])
        assert torch.allclose(weights, expected, atol=1e-6)


@pytest.fixture
def loader(data):
    with closing(runpy.run_path(str(TORCH))["make_loader"](*data, 0, 1, None)) as loader:
        yield loader


class InWorkers(IterableDataset):
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


def test_what_would_hand_out_samples_twice_is_refused(loader):
    with pytest.raises(TypeError, match=r"a Loader has no length: .* not over a torch DataLoader around it"):
        next(iter(DataLoader(loader)))
    with pytest.raises(Exception, match="in worker 0 of the 2 of a torch DataLoader"):
        next(iter(DataLoader(InWorkers(loader), batch_size=None, num_workers=2)))
    assert loader, "it has no length, and is none of zero"


def test_accelerate_hands_the_loader_back_as_it_is(loader):
    try:
        assert Accelerator(cpu=True).prepare(loader) is loader
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_loader_for_fewer_processes_than_there_are_is_warned_of(data, monkeypatch, caplog):
    make_loader = runpy.run_path(str(TORCH))["make_loader"]
    monkeypatch.setattr(own_loop.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(own_loop.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(own_loop.dist, "get_rank", lambda: 0)
    make_loader(*data, 1, 2, None).close()
    assert "shared out" not in caplog.text
    make_loader(*data, 0, 1, None).close()
    assert "rows are shared out to 1 process, and the process group has 2" in caplog.text
