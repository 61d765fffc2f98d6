"""A whole run on tiny real tars, for tests that stop, kill and resume it."""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import soundfile
import webdataset
import yaml
from PIL import Image

from trichord.batches.tokenizer import train_tokenizer
from trichord.config.load import load_run_config
from trichord.train import run

WORDS = ("zero", "one", "two", "three", "four")


def make_data(folder: Path) -> Path:
    """Three sources, `it` (image, text), `at` (audio, text), `iat` (all), and a tokenizer."""
    rng = np.random.default_rng(0)
    for name in ("it", "at", "iat"):
        with webdataset.ShardWriter(f"{folder}/{name}-%03d.tar", maxcount=20, verbose=0) as writer:
            for number in range(40):
                word = int(rng.integers(len(WORDS)))
                sample = {"__key__": f"{name}{number:04d}", "txt": WORDS[word]}
                if "i" in name:
                    sample["png"] = _png((rng.integers(0, 60, (16, 16, 3)) + word * 40).astype(np.uint8))
                if "a" in name:
                    sample["wav"] = _wav(0.4 * np.sin(np.arange(1600 + 160 * word) * (0.1 + 0.1 * word)))
                writer.write(sample)
    train_tokenizer(WORDS * 3, "word", 64, folder / "tokenizer")
    return folder


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _wav(samples: np.ndarray) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, 16000, format="WAV", subtype="PCM_16")
    return out.getvalue()


def write_config(data: Path, root: Path) -> Path:
    config = {
        "run": {"name": "tiny", "root": str(root), "max_steps": 30},
        "shards": {
            "window_samples": 16,
            "sources": [{"name": n, "shards": f"{data}/{n}-*.tar"} for n in ("it", "at", "iat")],
        },
        "samples": {"image": {"size": 16, "resize": "squash", "shift_frac": 0.1}},
        "batches": {
            "tokenizer": str(data / "tokenizer"),
            "rows_per_step": 4,
            "micro_rows": 1,
            "row_tokens": 48,
            "max_samples_per_row": 4,
        },
        "encoders": {
            "vision": {
                "name": "vit_tiny_patch16_224",
                "options": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False},
            },
            "audio": {"mel": {"n_mels": 8}, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "stride": 4},
            "text": {"kind": "mean", "hidden_size": 16},
        },
        "fusion": {
            "trunk": {
                "family": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_layers": 1,
                "num_heads": 2,
                "num_kv_heads": 1,
            }
        },
        "objectives": {"next_token": {}, "contrastive": {"embed_dim": 8}},
        "engine": {"zero_stage": 2, "precision": "fp32", "lr": 2e-3, "timeout_s": 60, "heartbeat_timeout_s": 6},
        "checkpoints": {"save_every_steps": 10},
        "tracking": {"log_every_steps": 1, "wandb": {"mode": "off"}},
    }
    path = root / "config.yaml"
    root.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config))
    return path


def train(config: str, *overrides: str) -> int:
    """Entry point of a rank: the exit code of `trichord train`."""
    return run(load_run_config(config, list(overrides)))


def slow_train(config: str, *overrides: str) -> int:
    """The same with a pause after every step, so that a test can act in the middle."""
    import trichord.journal as story

    check = story.Progress.check
    story.Progress.check = lambda self, *args: (check(self, *args), time.sleep(0.1))[0]
    return train(config, *overrides)


def wait_until(condition, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.05)
