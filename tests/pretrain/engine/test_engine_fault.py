"""Exceptions of a step in words: memory, disks, and collectives that broke because another rank is gone."""

import errno

import pytest
import torch

from trichord.core.errors import DataError
from trichord.core.phase import note, set_phase
from trichord.engine.config import EngineConfig
from trichord.engine.fault import Fault, is_broken_collective, readable


@pytest.fixture(autouse=True)
def _step():
    set_phase("backward", micro_step=1)
    small = {"tokens": 48, "useful": 40, "images": 0, "clips": 0}
    note(micro_batches=[small, {"tokens": 4096, "useful": 4000, "images": 12, "clips": 2}])


def words(error, **engine):
    return str(readable(error, EngineConfig(**engine), micro_rows=4))


def test_device_memory_names_phase_shape_and_keys():
    said = words(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line"), zero_stage=1)
    checkpointing = "false" if EngineConfig().activation_checkpointing is False else "none"
    assert said == (
        "out of memory on the device in backward, micro step 1, on a micro-batch of 4096 tokens (4000 in use), 12 "
        "images and 2 clips: lower batches.micro_rows (now 4), set engine.activation_checkpointing (now "
        f"{checkpointing}), raise engine.zero_stage (now 1), or set engine.offload (now none). "
        "Said: CUDA out of memory. Tried to allocate 2 GiB."
    )


def test_stage_3_is_not_told_to_go_higher():
    assert "zero_stage" not in words(MemoryError(), zero_stage=3)


def test_torch_s_own_allocator_is_host_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 56, dtype=torch.uint8)
    assert words(caught.value).startswith("out of memory on the host in backward")
    assert not is_broken_collective(caught.value)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the quota is used up"), (errno.EROFS, "read-only")],
)
def test_disks_are_told_with_the_file(number, says):
    said = words(OSError(number, "Sorry", "/runs/x/metrics.jsonl"))
    assert says in said
    assert "/runs/x/metrics.jsonl" in said


def test_a_worker_whose_death_comes_in_the_middle_of_a_step_is_one_message():
    """torch raises it in the handler of a signal, wherever the rank is."""
    said = words(RuntimeError("DataLoader worker (pid 953) is killed by signal: Killed. "))
    assert "a process of the loader has died: DataLoader worker (pid 953) is killed by signal: Killed. Most" in said
    assert "lower batches.num_workers" in said


def test_other_errors_stay_what_they_are():
    for error in (ValueError("x"), DataError("y"), OSError(errno.ENOENT, "No such file")):
        assert readable(error, EngineConfig(), 4) is error


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234",
        "[/pytorch/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 60000ms for recv operation to complete",
        "NCCL error in: ProcessGroupNCCL.cpp:1970, remote process exited or there was a network error",
    ],
)
def test_collectives_that_break_ask_for_the_cause(text):
    assert is_broken_collective(RuntimeError(text))


def test_errors_of_this_rank_do_not_wait_for_another():
    assert not is_broken_collective(RuntimeError("size mismatch, got 3, 4"))
    assert not is_broken_collective(torch.OutOfMemoryError("CUDA out of memory; NCCL ..."))
    assert not is_broken_collective(ValueError("gloo"))


def test_a_fault_survives_the_store():
    fault = Fault("stuck", "why", 3, 1, (1, 2), ("a",))
    assert Fault.from_json(fault.to_json()) == fault
