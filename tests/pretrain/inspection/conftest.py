"""A folder of faulty shards, and a config that trains on some of them."""

from pathlib import Path

import pytest
from inspection_corpus import CONFIG, faulty_members, pairs, write_tar


@pytest.fixture(scope="session")
def faulty(tmp_path_factory) -> Path:
    """a-000: every fault among 20 good samples; a-001: 60 good ones; a-002: cut in its middle. Not changed by tests."""
    folder = tmp_path_factory.mktemp("faulty")
    write_tar(folder / "a-000.tar", faulty_members())
    write_tar(folder / "a-001.tar", pairs(60, 100))
    cut = write_tar(folder / "a-002.tar", pairs(40, 400))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 + 100])
    return folder


@pytest.fixture(scope="session")
def configured(tmp_path_factory) -> Path:
    """Folder with `c.yaml`, `good/` (sources cats and dogs) and `tok/`. Not changed by tests."""
    from trichord.batches.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("configured")
    write_tar(folder / "good" / "cats-0.tar", pairs(40, 0, "cat"))
    write_tar(folder / "good" / "dogs-0.tar", pairs(10, 1000, "dog"))
    train_tokenizer([f"thing {i} of the world" for i in range(50)], "word", 256, folder / "tok")
    (folder / "c.yaml").write_text(CONFIG)
    return folder
