"""Texts for a tokenizer: of files, lists of shards, packed shards, chats, an http server."""

import gzip
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from building_world import chats, picture, put

from trichord.building.build import BuildRow, build_shards
from trichord.building.kinds import ConvertOptions, source_rows
from trichord.building.texts import texts_in_json, texts_of
from trichord.core.errors import DataError
from trichord.shards.config import FieldsConfig

SAID = ["What is it?", "A heron.", "Hello", "Hello!"]


@pytest.fixture
def shard(tmp_path) -> str:
    put(tmp_path / "0.jpg", picture())
    source = put(tmp_path / "chats.json", [chats()[0], chats()[2]])
    return build_shards(source_rows(source, "llava", ConvertOptions(), FieldsConfig()), tmp_path / "shards")[0]


def test_chats_are_read_from_folders_lists_and_packed_shards(shard, tmp_path):
    listed = put(tmp_path / "list.txt", f"# one\n\n{shard}\n")
    with open(shard, "rb") as file:
        packed = put(tmp_path / "packed.tar.gz", gzip.compress(file.read()))
    for source in (tmp_path / "shards", shard, f"{tmp_path}/shards/*", listed, packed):
        assert list(texts_of([str(source)])) == SAID


def test_a_list_on_a_server_is_one_and_a_text_is_a_text(shard, tmp_path, monkeypatch):
    put(tmp_path / "shards/list.txt", "shard-000000.tar\n")
    put(tmp_path / "shards/words.txt", "shard-000000.tar\nis the name of a shard\n")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "shards"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        words = ["shard-000000.tar", "is the name of a shard"]
        assert list(texts_of([f"{tmp_path}/shards/words.txt"])) == words
        assert list(texts_of([f"{base}/words.txt"])) == words
        assert list(texts_of([f"{base}/list.txt"])) == SAID
        server.shutdown()


def test_texts_captions_and_prompts_of_samples(tmp_path):
    document = b'{"messages": [{"role": "document", "content": [{"type": "text", "text": "One"}]}], "prompt": "Say"}'
    rows = [
        BuildRow("a", {"txt": b"caption", "json": b'{"licence": "cc0"}'}),
        BuildRow("b", {"json": document}),
        BuildRow("c", {"txt": b"no json", "json": b"{"}),
    ]
    assert list(texts_of(build_shards(rows, tmp_path))) == ["caption", "One", "Say", "no json"]
    assert list(texts_in_json({"messages": [{"content": "plain"}, {"content": 3}, 4, {"content": [None]}]})) == [
        "plain"
    ]


def test_what_is_no_text_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: no such file; expected a text file, or shards"):
        list(texts_of([f"{tmp_path}/gone.txt"]))
    with pytest.raises(DataError, match=r"x\.jpg, line 1: not UTF-8.*expected a UTF-8 text file, or shards"):
        list(texts_of([str(put(tmp_path / "x.jpg", picture()))]))
