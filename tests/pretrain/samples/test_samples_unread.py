"""What no sample reads is told before hours of training on the rest, and what is read is not."""

import io
import json
import logging
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from trichord.config.identity import RunFolder
from trichord.config.load import load_run_config
from trichord.core.errors import ConfigError
from trichord.engine.stop import StopFlag
from trichord.opening import make_sidecars
from trichord.samples.filters import read_exclude_list
from trichord.samples.unread import OTHER_CHATS, other_chat, unmapped, warn_at_start
from trichord.shards.config import FieldsConfig, FiltersConfig, SourceConfig
from trichord.shards.index import index_shards


def picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def shard(folder, members) -> str:
    path = folder / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def samples(**members) -> list[tuple[str, bytes]]:
    """40 samples with these members; `__` in a name is a dot."""
    return [(f"{n}.{ext.replace('__', '.')}", content) for n in range(40) for ext, content in members.items()]


def told(folder, members, caplog, fields=None, exclude=()) -> list[str]:
    path = shard(folder, members)
    source = SourceConfig(
        name="pets", shards=(path,), fields=fields or FieldsConfig(), filters=FiltersConfig(exclude=exclude)
    )
    with caplog.at_level(logging.WARNING, "trichord"):
        lists = {name: read_exclude_list(name) for name in exclude}
        warn_at_start([(source, index_shards([path], fields=source.fields))], lists, 2**20)
    return [record.getMessage() for record in caplog.records]


def chat(*parts) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(parts)}]}).encode()


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (samples(gif=b"GIF89a", txt=b"a"), "40 members .gif are mapped to no field and are not read; convert"),
        (samples(oga=b"OggS", txt=b"a"), r"40 members .oga are mapped to no field \(`fields` of the source\)"),
        (samples(input__png=picture(), txt=b"a"), "40 members .input.png are read by no sample"),
        (samples(json=b'{"conversations": [{"from": "human"}]}'), "8 json members hold a chat under `conversations`"),
        (
            [(f"{n}.{ext}", content) for ext, content in (("png", picture()), ("txt", b"a")) for n in range(20)],
            "20 times a key comes back after others .0, 1, 2.: the members of one sample must stand together",
        ),
    ],
)  # fmt: skip
def test_a_start_warns_of_media_that_nothing_reads(members, words, tmp_path, caplog):
    (line,) = told(tmp_path, members, caplog)
    assert line.startswith(f"source pets: in shard {tmp_path}/a.tar, ")
    assert re.search(words, line), line


@pytest.mark.parametrize(
    "members",
    [
        samples(png=picture(), txt=b"a", json=b'{"turns": 3}'),
        samples(png=picture(), cls=b"3"),  # no media: nothing is missed
        [*samples(png=picture()), ("extra.gif", b"GIF89a"), ("extra.txt", b"a")],  # one of many
        [member for n in range(9) for member in ((f"{n}.0.png", picture()), (f"{n}.json", chat({"type": "image"})))],
    ],
)  # fmt: skip
def test_a_start_says_nothing_of_what_is_read(members, tmp_path, caplog):
    assert told(tmp_path, members, caplog) == []


def test_a_mapped_extension_is_not_unmapped():
    fields = FieldsConfig(image=("left.png",), audio=("oga",))
    found = unmapped({"left.png": 1, "oga": 1, "1.oga": 1, "0.gif": 2, "11.gif": 1, "json": 1, "pkl": 1}, fields)
    assert found == {("unmapped", "N.gif"): 3}


@pytest.mark.parametrize("key", OTHER_CHATS)
def test_chats_under_other_names(key):
    assert other_chat({key: [{"from": "gpt", "value": "x"}]}) == key
    assert other_chat({key: ["some", "words"]}) is None
    assert other_chat({key: []}) is None


def test_an_exclude_list_of_other_shards_is_told(tmp_path, caplog):
    (tmp_path / "bad.jsonl").write_text('{"shard": "old/b.tar", "key": "3"}\n' * 6)
    (tmp_path / "own.jsonl").write_text('{"shard": "old/a.tar", "key": "3"}\n')
    lists = (str(tmp_path / "bad.jsonl"), str(tmp_path / "own.jsonl"))
    (line,) = told(tmp_path, samples(txt=b"a"), caplog, exclude=lists)
    assert f"0 of 6 lines of {lists[0]} matched a sample of pets" in line


def test_the_opening_of_a_run_warns_and_reads_exclude_lists_before_it_indexes(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = shard(tmp_path, samples(gif=b"GIF89a", txt=b"a"))
    overrides = [f"shards.sources=[{{name: pets, shards: {path}}}]", "evaluation=null"]
    folder = RunFolder("fresh", tmp_path, 1)
    wrong = load_run_config("debug/tiny.yaml", [*overrides, "shards.sources.pets.filters.exclude=[no.jsonl]"])
    with pytest.raises(ConfigError, match=r"no\.jsonl cannot be read"):
        make_sidecars(wrong, folder, StopFlag())
    assert not list(tmp_path.glob("*.idx"))
    with caplog.at_level(logging.WARNING, "trichord"):
        make_sidecars(load_run_config("debug/tiny.yaml", overrides), folder, StopFlag())
    assert any(".gif are mapped to no field" in record.getMessage() for record in caplog.records)
