"""Folders for the command line: one that can train, one that has."""

import importlib
import shutil
from pathlib import Path

import pytest
from cli_world import CONFIG, in_a_fork, png


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory) -> Path:
    """Folder with `c.yaml`, `shards/` (16 pictures with words) and `tok/`. Copied, never changed."""
    from trichord.batches.tokenizer import train_tokenizer
    from trichord.building.build import BuildRow, build_shards

    folder = tmp_path_factory.mktemp("tiny")
    rows = [BuildRow(f"{i:04d}", {"png": png(i), "txt": f"thing {i}".encode()}) for i in range(16)]
    build_shards(rows, folder / "shards")
    train_tokenizer([f"thing {i}" for i in range(16)], "word", 64, folder / "tok")
    (folder / "c.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="session")
def imported() -> None:
    """What training imports, once, in the parent of all forks."""
    for name in ("deepspeed", "timm", "wandb", "trichord.train", "trichord.evaluate", "trichord.release.export"):
        importlib.import_module(name)


@pytest.fixture(scope="session")
def finished_world(imported, tiny_world, tmp_path_factory) -> Path:
    """The tiny world after `trichord train c.yaml`: with `runs/demo` and its checkpoints. Copied, never changed."""
    folder = tmp_path_factory.mktemp("finished") / "world"
    shutil.copytree(tiny_world, folder)
    ended = in_a_fork(["train", "c.yaml"], folder)
    assert ended.code == 0, ended.stderr
    return folder
