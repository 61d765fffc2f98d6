"""Faults that tests plant in a run: each is a function that a rank calls before it trains.

Real ones, as far as they can be had: a kill is a kill, a full file system refuses bytes, memory is asked for that
nobody has. They come at a step of training, on one rank.
"""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from trichord.cli import main
from trichord.core.dist import rank_facts


def train_planted(plant: str, facts: dict, config: str, overrides: list[str]) -> int:
    """Entry point of a rank: `trichord train` with the plant of that name; returns the exit code.

    stderr goes to a file beside the config, since that of a forked rank is its fork server's.
    """
    os.dup2(os.open(Path(config).with_name(f"stderr-{rank_facts().rank}"), os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    finish = PLANTS[plant](**facts)
    code = main(["train", config, *overrides])
    if finish is not None:
        finish()
    return code


def at_step(step: int, rank: int | None, act: Callable[[], object]) -> None:
    """Call `act` inside the forward pass of a step (0 is the first) on a rank, or on all."""
    from trichord.engine.step import Stepper

    run, done = Stepper.run, []

    def planted(self, *args, **kwargs):
        if len(done) == step and rank in (None, rank_facts().rank):
            forward = self.engine.forward

            def broken(*inputs, **options):
                self.engine.forward = forward
                act()
                return forward(*inputs, **options)

            self.engine.forward = broken
        done.append(step)
        return run(self, *args, **kwargs)

    Stepper.run = planted


def nothing() -> None:
    """The run is left alone; the test acts from outside."""


def slow_steps(seconds: float = 0.1) -> None:
    """A pause after each step, so that a test can act in the middle."""
    from trichord.progress import Progress

    check = Progress.check
    Progress.check = lambda self, *args: (check(self, *args), time.sleep(seconds))[0]


def hang(rank: int, step: int) -> None:
    at_step(step, rank, lambda: time.sleep(600))


def kill(rank: int, step: int) -> None:
    slow_steps(0.5)  # so that a save that was begun before is on the disk, also on a busy machine
    at_step(step, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def stop_while_indexing() -> None:
    """Rank 0 has a signal between two shards."""
    from trichord import opening

    index_shards = opening.index_shards

    def planted(urls, workers, note, fields):
        def signalled(done, total, url):
            os.kill(os.getpid(), signal.SIGTERM)
            note(done, total, url)

        return index_shards(urls, workers, signalled, fields)

    opening.index_shards = planted


def raise_bug(rank: int, step: int) -> None:
    at_step(step, rank, lambda: 1 // 0)


def host_memory(rank: int, step: int) -> None:
    at_step(step, rank, lambda: torch.empty(1 << 56, dtype=torch.uint8))


def device_memory(rank: int, step: int) -> None:
    def act():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.\nmore")

    at_step(step, rank, act)


def worker_hangs(rank: int, calls: int) -> None:
    in_decoding(rank, calls, lambda: time.sleep(600))


def worker_dies(rank: int, calls: int) -> None:
    in_decoding(rank, calls, lambda: os.kill(os.getpid(), signal.SIGKILL))


def worker_memory(rank: int, calls: int) -> None:
    def act():
        bytearray(1 << 56)

    in_decoding(rank, calls, act)


def in_decoding(rank: int, calls: int, act: Callable[[], object]) -> None:
    """Call `act` when a decode worker of the rank has its image number `calls`."""
    from trichord.samples import sample

    decode, seen = sample.decode_image, []

    def planted(*args, **kwargs):
        seen.append(1)
        if len(seen) == calls and rank_facts().rank == rank:
            act()
        return decode(*args, **kwargs)

    sample.decode_image = planted


def file_size(step: int, limit: int) -> None:
    """From a step on no file can grow beyond `limit` bytes: what a full disk looks like to each of them."""
    at_step(step, None, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


def log_on_full_disk(folder: str) -> None:
    """The log of rank 0 lies on a device that is always full."""
    logs = Path(folder) / "logs"
    logs.mkdir(parents=True)
    (logs / "rank-00000.log").symlink_to("/dev/full")


def not_finite(rank: int, steps: list[int], damaged: str = "") -> None:
    """The loss of a rank is nan in these micro-steps. damaged: a file whose bytes change before the first rewind."""
    from trichord.engine import step as engine_step

    if damaged and rank_facts().rank == 0:
        _change_before_rewind(Path(damaged))

    losses, calls = engine_step.micro_loss, []

    def planted(*args, **kwargs):
        calls.append(1)
        if len(calls) - 1 in steps and rank_facts().rank == rank:
            output = args[1]
            output["next_token_loss_sum"] = output["next_token_loss_sum"] * float("nan")
        return losses(*args, **kwargs)

    engine_step.micro_loss = planted


def _change_before_rewind(file: Path) -> None:
    from trichord import train

    find = train.whole_to_rewind

    def planted(*args):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        train.whole_to_rewind = find
        return find(*args)

    train.whole_to_rewind = planted


def shards_vanish(step: int, pattern: str) -> None:
    """The shards are gone, and so is what the process had open of them."""
    from trichord.shards import storage

    folder, _, glob = pattern.rpartition("/")

    def act():
        for path in Path(folder).glob(glob):
            path.unlink(missing_ok=True)
            storage._open_files.drop(str(path))

    at_step(step, None, act)


def slow_save(seconds: float) -> None:
    """Writing a checkpoint takes that long."""
    from trichord.checkpoints.save import CheckpointSaver

    write = CheckpointSaver._write
    CheckpointSaver._write = lambda self, *args: (time.sleep(seconds), write(self, *args))[1]
    slow_steps()


def read_only(folder: str) -> None:
    """The run folder is read-only, for root too."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    mount = private_mounts()
    mount(folder, folder, "none", MS_BIND)
    mount("none", folder, "none", MS_BIND | MS_REMOUNT | MS_RDONLY)


def full_disk(folder: str, copy: str, step: int, leave: int) -> Callable[[], object]:
    """The run folder is a disk of 8 MiB of its own; at a step somebody fills it up but for `leave` bytes. When the run
    has ended it is copied, since no other process sees it."""
    Path(folder).mkdir(parents=True)
    private_mounts()("none", folder, "tmpfs", 0, "size=8m")

    def act():
        filler = os.open(Path(folder) / "filler", os.O_WRONLY | os.O_CREAT)
        with suppress(OSError):
            while os.write(filler, bytes(4096)) == 4096:
                pass
        os.ftruncate(filler, os.fstat(filler).st_size // 4096 * 4096 - leave)
        os.close(filler)

    at_step(step, None, act)
    return lambda: shutil.copytree(folder, copy)


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_PRIVATE_ALL = 0x1, 0x20, 0x1000, 0x44000
CLONE_NEWNS = 0x20000


def private_mounts() -> Callable[..., None]:
    """This process has mounts of its own from now on; needs root. Returns mount(source, target, type, flags, data)."""
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int, what: str) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), what)

    def mount(source: str, target: str, kind: str, flags: int, data: str | None = None) -> None:
        options = None if data is None else data.encode()
        checked(libc.mount(source.encode(), target.encode(), kind.encode(), flags, options), f"mount {target}")

    checked(libc.unshare(CLONE_NEWNS), "unshare")
    mount("none", "/", "none", MS_PRIVATE_ALL)
    return mount


def may_mount() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            private_mounts()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


PLANTS = {function.__name__: function for function in (
    nothing, slow_steps, stop_while_indexing, hang, kill, raise_bug, host_memory, device_memory, worker_hangs,
    worker_dies, worker_memory, file_size, log_on_full_disk, not_finite, shards_vanish, slow_save, read_only, full_disk,
)}  # fmt: skip
