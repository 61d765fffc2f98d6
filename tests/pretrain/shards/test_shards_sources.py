"""Which shards a source means, and what is said when it means none."""

import fsspec
import pytest

from trichord.core.errors import ConfigError, DataError
from trichord.shards.arguments import argument_shards
from trichord.shards.config import SourceConfig
from trichord.shards.sources import expand_braces, expand_shards
from trichord.shards.storage import shard_identity


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d/{0..3}.tar", ["d/0.tar", "d/1.tar", "d/2.tar", "d/3.tar"]),
        ("d/{008..010}.tar", ["d/008.tar", "d/009.tar", "d/010.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{train,extra}-{0..1}", ["train-0", "train-1", "extra-0", "extra-1"]),
        ("{a,b{0..1}}", ["a", "b0", "b1"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_braces(pattern, expected):
    assert sorted(set(expand_braces(pattern))) == sorted(expected)


@pytest.mark.parametrize("pattern", ["{0..9", "0..9}.tar", "{0-9}.tar", "{a..c}.tar"])
def test_malformed_braces_are_named(pattern):
    with pytest.raises(ConfigError) as caught:
        list(expand_braces(pattern))
    assert pattern in str(caught.value)
    assert "{0000..0099}" in str(caught.value)


def _source(*shards: str) -> SourceConfig:
    return SourceConfig(name="cats", shards=shards)


@pytest.fixture
def folder(tmp_path):
    for name in ("b-1.tar", "b-0.tar", "a.tar", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_globs_and_names_are_sorted_and_unique(folder):
    found = expand_shards(_source(f"{folder}/b-{{0..1}}.tar", f"{folder}/*.tar", f"{folder}/a.tar"))
    assert found == [f"{folder}/{name}" for name in ("a.tar", "b-0.tar", "b-1.tar")]


def test_file_url(folder):
    assert expand_shards(_source(f"file://{folder}/a.tar")) == [f"{folder}/a.tar"]


def test_a_name_with_glob_characters_is_still_a_name(tmp_path):
    path = tmp_path / "x[1].tar"
    path.write_bytes(b"")
    assert expand_shards(_source(str(path))) == [str(path)]


def test_nothing_found_names_source_pattern_and_folder(folder):
    with pytest.raises(DataError, match=r"'cats'.*nope/\*\.tar.*no such folder.*trichord data build"):
        expand_shards(_source(f"{folder}/nope/*.tar"))


def test_missing_shards_of_a_range_are_counted_and_named(folder):
    with pytest.raises(DataError, match=r"3 of 5 shards .*b-2\.tar, .*b-3\.tar, .*b-4\.tar"):
        expand_shards(_source(f"{folder}/b-{{0..4}}.tar"))


def test_a_folder_stands_for_the_tars_in_it_not_below_it(folder, tmp_path_factory):
    (folder / "below").mkdir()
    (folder / "below" / "z.tar").touch()
    (folder / "notes.md").touch()
    found = expand_shards(_source(str(folder)))
    assert found == sorted(str(path) for path in folder.glob("*.tar"))
    assert found
    with pytest.raises(DataError, match=r"expected a folder that holds \.tar files, and it holds none"):
        expand_shards(_source(str(tmp_path_factory.mktemp("empty"))))


@pytest.mark.parametrize("ending", ["tar.bz2", "tar.xz", "tar.zst", "gz"])
def test_shards_of_other_compressions_are_refused(folder, ending):
    (folder / f"c.{ending}").write_bytes(b"")
    with pytest.raises(DataError, match=rf"c\.{ending} is compressed.*only \.tar\.gz and \.tgz.*bunzip2"):
        expand_shards(_source(f"{folder}/c.{ending}"))


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "TAR.GZ"])
def test_tar_gz_is_let_through(folder, ending):
    (folder / f"c.{ending}").write_bytes(b"")
    assert expand_shards(_source(f"{folder}/c.*")) == [f"{folder}/c.{ending}"]


def test_a_list_names_shards_beside_itself_by_path_and_by_url(folder, tmp_path):
    (folder / "mine.txt").write_text(
        f"# all of them\n\n  b-{{0..1}}.tar\n{folder}/a.tar\ns3://bucket/x.tar\n*.tar\n", encoding="utf-8"
    )
    assert expand_shards(_source(f"{folder}/mine.txt", f"{folder}/a.tar")) == [
        *(f"{folder}/{name}" for name in ("a.tar", "b-0.tar", "b-1.tar")),
        "s3://bucket/x.tar",
    ]


def test_a_remote_list():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/lists/deep/train.txt", b"0.tar\nmemory://elsewhere/1.tar\n")
    assert expand_shards(_source("memory://lists/deep/train.txt")) == [
        "memory://elsewhere/1.tar",
        "memory://lists/deep/0.tar",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", r"names no shard; write one path or URL per line"),
        (b"\xff\xfe", r"is not UTF-8"),
        (b"pipe:cat x.tar", r"'pipe:' runs a shell command and is refused"),
        (b"other.txt", r"a list of shards names .*other\.txt, a list"),
        (b"gone.tar", r"gone\.tar: no such file; expected a shard"),
    ],
)
def test_lists_that_cannot_be_used(folder, content, message):
    (folder / "other.txt").write_bytes(b"a.tar")
    (folder / "bad.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        expand_shards(_source(f"{folder}/bad.txt"))


def test_a_missing_remote_list_is_named():
    with pytest.raises(DataError, match=r"reading the list of shards memory://lists/none\.txt"):
        expand_shards(_source("memory://lists/none.txt"))


def test_a_password_in_an_address_is_refused():
    with pytest.raises(ConfigError, match=r"holds a user name.*\.netrc") as caught:
        shard_identity("https://me:secret@example.org/a.tar")
    assert "secret" not in str(caught.value)


def test_remote_glob():
    fs = fsspec.filesystem("memory")
    for name in ("x/2.tar", "x/1.tar", "x/1.idx"):
        fs.pipe_file(f"/sources/{name}", b"")
    found = expand_shards(_source("memory://sources/x/*.tar"))
    assert found == ["memory:///sources/x/1.tar", "memory:///sources/x/2.tar"]


def test_a_remote_folder_stands_for_the_tars_in_it():
    fs = fsspec.filesystem("memory")
    for name in ("y/2.tar", "y/1.tgz", "y/1.idx", "y/below/3.tar", "z/notes.md"):
        fs.pipe_file(f"/folders/{name}", b"")
    for url in ("memory://folders/y", "memory://folders/y/"):
        assert expand_shards(_source(url)) == ["memory:///folders/y/1.tgz", "memory:///folders/y/2.tar"]
    with pytest.raises(
        DataError, match=r"memory://folders/z: expected a folder that holds \.tar files, and it holds n"
    ):
        expand_shards(_source("memory://folders/z"))
    with pytest.raises(DataError, match=r"there is no memory://folders/none; expected a shard, or a folder"):
        expand_shards(_source("memory://folders/none"))


def test_http_servers_are_not_listed_and_a_query_is_no_pattern():
    with pytest.raises(
        ConfigError, match=r"https://example\.org/d/: expected a shard, got a folder; .*\{0000\.\.0099\}"
    ):
        expand_shards(_source("https://example.org/d/"))
    named = ["https://example.org/a.tar?sign=*[x]", "https://example.org/get?id=3"]
    assert expand_shards(_source(*named)) == named


def test_messages_speak_of_the_arguments_where_there_is_no_config(folder):
    for word, message in (
        ("gone.tar", r"^gone\.tar: no such file; expected a shard"),
        (f"{folder}/c-*.tar", r"^no shard matches .*check the argument, or build"),
        (f"{folder}/b-{{0..4}}.tar", r"^3 of 5 shards named by"),
        (f"{folder}/notes.txt", r"^the list .* names no shard"),
    ):
        with pytest.raises(DataError, match=message):
            expand_shards(argument_shards([word]))
    with pytest.raises(ConfigError, match=r"'pipe:cat x': expected a path or a URL, .*never run"):
        argument_shards(["a.tar", "pipe:cat x"])


def _look_at(url: str) -> None:
    """A glob is listed at once, a name is first looked at when its shard is read."""
    for shard in expand_shards(_source(url)):
        shard_identity(shard)


@pytest.mark.parametrize("url", ["nosuchfs://bucket/*.tar", "nosuchfs://bucket/a.tar"])
def test_an_unknown_file_system_is_named_with_what_is_expected(url):
    with pytest.raises(ConfigError, match=r"'nosuchfs://.*Protocol not known: nosuchfs; expected a path, .*s3://"):
        _look_at(url)


@pytest.mark.parametrize("url", ["s3://bucket/*.tar", "s3://bucket/a.tar"])
def test_a_file_system_that_is_not_installed_says_what_to_install(monkeypatch, url):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"s3://bucket/.*Install s3fs.*pip install 'trichord\[s3\]'"):
        _look_at(url)
