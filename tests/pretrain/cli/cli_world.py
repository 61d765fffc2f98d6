"""A tiny world for the command line: one shard, one tokenizer, one config that trains in a second."""

import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import wave
from dataclasses import dataclass
from pathlib import Path

from trichord.cli import main

CONFIG = """\
run: {name: demo, max_steps: 2}
shards:
  window_samples: 4
  min_samples_for_bad_fraction: 1
  sources:
    - name: things
      shards: shards/*.tar
batches: {tokenizer: tok, rows_per_step: 2, micro_rows: 2, row_tokens: 64, max_samples_per_row: 4}
samples:
  image: {size: 16}
encoders:
  vision: {name: vit_tiny_patch16_224, options: {patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}}
  text: {kind: mean, hidden_size: 16}
fusion: {kind: none}
objectives:
  contrastive: {pairs: [image-text], embed_dim: 8}
engine: {zero_stage: 0, precision: fp32, lr: 1e-3}
checkpoints: {save_every_steps: 1}
tracking: {log_every_steps: 1, wandb: {mode: off}}
"""


def png(value: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (16, 16), (value % 256, 0, 0)).save(out, "PNG")
    return out.getvalue()


def wav(frames: int = 1600) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(b"\0\0" * frames)
    return out.getvalue()


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def in_a_fork(
    arguments: list[str], folder: Path, environment: dict[str, str] | None = None, limit_s: float = 60
) -> Ended:
    """`trichord ARGUMENTS` as a process of its own in `folder`: forked, so that torch is imported once for all.

    A fork and not a call: training leaves a process group behind, and a test must see the exit code of a process.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            code = 99  # a bug: its traceback is in stderr
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                os.chdir(folder)
                os.environ.update(environment or {})
                logging.root.handlers.clear()  # pytest's, which would keep what nobody has set up a log for from stderr
                code = main(arguments)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = wait(child, limit_s)
        out.seek(0)
        err.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), out.read(), err.read())


def wait(child: int, limit_s: float) -> int:
    """Wait status of a child; killed after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline += limit_s
        time.sleep(0.01)
