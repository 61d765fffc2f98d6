"""Steps on their way to the device: the same ones, in order, and errors come out where they belong."""

import itertools
from contextlib import closing

import pytest
import torch

from trichord.batches.transfer import move_ahead


def test_on_a_cpu_steps_pass_as_they_are(corpus):
    with closing(corpus.loader()) as loader:
        steps = move_ahead(iter(loader), torch.device("cpu"))
        states = [step.state.step for step in itertools.islice(steps, 3)]
        steps.close()
        assert (states, loader.state.step) == ([1, 2, 3], 3)


@pytest.mark.gpu
def test_on_a_gpu_the_same_batches_arrive(corpus):
    device = torch.device("cuda")
    with closing(corpus.loader()) as plain, closing(corpus.loader()) as ahead:
        moved = move_ahead(iter(ahead), device)
        for expected, got in itertools.islice(zip(plain, moved), 8):
            assert got.state == expected.state
            for a, b in zip(expected.micro_batches, got.micro_batches):
                assert b.input_ids.device.type == "cuda"
                torch.testing.assert_close(b.pixels.cpu(), a.pixels)
                torch.testing.assert_close(b.labels.cpu(), a.labels)
        moved.close()


@pytest.mark.gpu
def test_an_error_of_the_loader_comes_after_the_steps_before_it(corpus):
    with closing(corpus.loader()) as loader:
        two = itertools.islice(iter(loader), 2)
        moved = move_ahead(itertools.chain(two, (1 // 0 for _ in range(1))), torch.device("cuda"))
        assert [next(moved).state.step, next(moved).state.step] == [1, 2]
        with pytest.raises(ZeroDivisionError):
            next(moved)
