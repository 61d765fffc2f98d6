"""Shared slots: seen by forked processes, given back, and dispensable."""

import gc
import itertools
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from trichord.batches import slots as slots_module
from trichord.batches.slots import RowSlots


def test_what_a_forked_process_writes_is_seen_here():
    slots = RowSlots(2, 4096)
    number = slots.take()
    process = get_context("fork").Process(target=lambda: slots.view(number, 4096).fill(7))
    process.start()
    process.join(30)
    assert (slots.view(number, 4096) == 7).all()


def test_slots_are_handed_out_once_until_they_are_given_back():
    slots = RowSlots(2, 64)
    first, second = slots.take(), slots.take()
    assert {first, second} == {0, 1}
    assert slots.take() is None
    slots.give_back(first)
    assert slots.take() == first


def test_a_lent_slot_comes_back_with_the_last_view_of_it():
    slots = RowSlots(1, 64)
    slot = slots.take()
    tensor = torch.from_numpy(slots.lend(slot, 32)[8:16].view(np.int32).reshape(1, 2))
    gc.collect()
    assert slots.take() is None, "a tensor still reads it"
    other = tensor[0]
    del tensor
    gc.collect()
    assert slots.take() is None
    del other
    gc.collect()
    assert slots.take() == slot


def test_address_space_is_not_memory():
    slots = RowSlots(64)
    slots.view(slots.take(), 10)[:] = 1
    resident = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssShmem"))
    assert int(resident.split()[1]) < 2**20


def test_a_machine_that_gives_no_such_memory_has_no_slots(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(slots_module.mmap, "mmap", refuse)
    assert RowSlots(3).take() is None


def test_a_batch_stays_as_it_is_when_its_rows_memory_is_used_again(corpus):
    """Rows travel in memory that is used again and again; what was handed out must not change under the caller."""
    kept = []
    for num_workers in (0, 2):
        with closing(corpus.loader(num_workers=num_workers, prefetch_steps=1)) as loader:
            kept.append(list(itertools.islice(loader, 20)))
    for plain, lent in zip(*kept):
        for a, b in zip(plain.micro_batches, lent.micro_batches):
            assert torch.equal(a.input_ids, b.input_ids)
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.waveforms, b.waveforms)
