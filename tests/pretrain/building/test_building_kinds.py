"""Every kind of source becomes shards that webdataset and our index read."""

import json
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from building_world import chat_of, chats, clip, digests, make_world, members, picture, problems, put

from trichord.building.build import BuildResult, Layout, build
from trichord.building.kinds import KINDS, ConvertOptions, guess_kind, source_identity, source_rows
from trichord.cli import main
from trichord.core.errors import ConfigError, DataError
from trichord.shards.config import FieldsConfig, ShardsConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "data" / "build.md"


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    make_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def convert(source: Path, kind: str, on_bad: str = "stop", shuffle: int | None = None, **options) -> BuildResult:
    """Build into a new folder beside the source."""
    chosen = ConvertOptions(**options)
    out = source.parent / f"out-{len(list(source.parent.glob('out-*')))}"
    rows = source_rows(source, kind, chosen, FieldsConfig(), shuffle is not None)
    identity = source_identity(source, kind, chosen)
    return build(rows, out, Layout(shuffle=shuffle, samples_per_shard=3), identity=identity, on_bad=on_bad)  # type: ignore[arg-type]


def converted(source: Path, kind: str, **options) -> list[dict[str, bytes]]:
    """The samples in their order, after a look at our index of them."""
    result = convert(source, kind, **options)
    assert problems(result.paths) == [None] * result.samples
    return list(members(result.paths).values())


def facts_of(sample: dict[str, bytes]) -> dict:
    return json.loads(sample["json"])


def test_the_examples_of_the_document_run(world, capsys):
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert {words[words.index("--from") + 1] for words in map(shlex.split, commands) if "--from" in words} | {
        "table",
        "llava",
    } == {*KINDS}
    for command in commands:
        assert main(["--", *shlex.split(command)[1:]][1:]) == 0, command
    capsys.readouterr()
    for folder in (world / "shards").iterdir():
        paths = sorted(folder.rglob("*.tar"))
        assert problems(paths) == [None] * len(members(paths))
    overlay = yaml.safe_load((world / "shards/by-class/sources.yaml").read_text())
    assert [source.name for source in ShardsConfig(**overlay["shards"]).sources] == ["heron", "otter"]


def test_a_table_names_its_columns_and_the_folder_of_its_files(world):
    first, second = converted(
        world / "captions.csv", "table", media=Path("photos"), column={"image": "file", "text": "caption"}
    )
    assert first == {"jpg": picture(0), "txt": b"a heron", "json": b'{"licence": "cc0"}'}
    assert second["jpg"] == picture(1)


def test_class_folders_become_labels(world):
    samples = converted(world / "animals", "imagefolder")
    assert [facts_of(sample) for sample in samples] == [
        {"class": "heron", "label": 0, "file": "heron/a.v2.jpg"},
        {"class": "heron", "label": 0, "file": "heron/old/b.png"},
        {"class": "otter", "label": 1, "file": "otter/c.jpg"},
    ]
    assert samples[1]["png"] == (world / "animals/heron/old/b.png").read_bytes()


def test_conversations_become_chats(world):
    one, two, three = converted(world / "llava.json", "llava", media=world / "photos")
    assert chat_of(one) == [("user", ["0.jpg", "What is it?"]), ("assistant", ["A heron."])]
    assert one["0.jpg"] == picture(0)
    assert facts_of(one)["id"] == "a"
    assert chat_of(two) == [
        ("system", ["Be brief."]),
        ("user", ["Is ", "0.jpg", " like ", "1.jpg", "? And ", "0.flac", "?"]),
        ("assistant", ["Yes. A dog."]),
    ]
    assert (two["1.jpg"], two["0.flac"]) == (picture(2), clip())
    assert chat_of(three) == [("user", ["Hello"]), ("assistant", ["Hello!"])]
    assert [*three] == ["json"]


def test_chats_name_their_members_as_the_samples_room_reads_them(world):
    from trichord.samples.config import TextConfig
    from trichord.samples.interleaved import parse_messages
    from trichord.shards.index import load_index

    index = load_index(convert(world / "llava.json", "llava", media=world / "photos").paths[0])
    samples = members([index.url])
    entry = index.entry(1)
    turns = parse_messages(facts_of(samples[entry.key])["messages"], entry.key, entry.siblings, TextConfig())
    assert [turn.role for turn in turns] == ["system", "user", "assistant"]
    items = [part for part in turns[1].content if not isinstance(part, str)]
    assert [(item.kind, item.size) for item in items] == [
        ("image", (16, 12)),
        ("image", (16, 12)),
        ("audio", (800, 8000)),
    ]


def test_json_lines_of_role_and_content_are_the_same_chats(world):
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "A heron."},
            ],
            "images": ["0.jpg"],
        },
        {
            "image": "0.jpg",
            "conversations": [{"from": "user", "value": "Who?"}, {"from": "gpt", "value": "I."}],
            "system": "S",
        },
    ]
    put(world / "photos/chats.jsonl", "\n".join(map(json.dumps, rows)))
    one, two = converted(world / "photos/chats.jsonl", "llava")
    assert chat_of(one) == [("user", ["0.jpg", "What is it?"]), ("assistant", ["A heron."])]
    assert chat_of(two) == [("system", ["S"]), ("user", ["0.jpg", "Who?"]), ("assistant", ["I."])]


def test_coco_writes_every_caption_in_rounds_or_the_first(world):
    samples = converted(world / "coco", "coco")
    assert [(sample["txt"], facts_of(sample)) for sample in samples] == [
        (b"A heron.", {"image_id": 9, "id": 1}),
        (b"An otter.", {"image_id": 25, "id": 3}),
        (b"A grey bird.", {"image_id": 9, "id": 2}),
    ]
    assert samples[0]["jpg"] == samples[2]["jpg"] == picture(9)
    first = converted(
        world / "coco/annotations/captions_val2017.json", "coco", captions="first", media=Path("coco/val2017")
    )
    assert [sample["txt"] for sample in first] == [b"A heron.", b"An otter."]


def test_vqa_asks_all_about_an_image_in_one_chat(world):
    one, two = converted(world / "vqa", "vqa")
    assert chat_of(one) == [
        ("user", ["0.jpg", "Is it a bird?\nAnswer the question using a single word or phrase."]),
        ("assistant", ["yes"]),
        ("user", ["What colour?"]),
        ("assistant", ["grey"]),
    ]
    assert facts_of(one)["questions"][1] == {"question_id": 42001, "answers": ["grey", "no"]}
    assert (one["0.jpg"], two["0.jpg"]) == (picture(42), picture(73))


def test_vqa_one_chat_per_question(world):
    samples = converted(world / "vqa", "vqa", questions="single", instruction="")
    assert [chat_of(sample) for sample in samples][1] == [("user", ["0.jpg", "What colour?"]), ("assistant", ["grey"])]
    assert [facts_of(sample)["image_id"] for sample in samples] == [42, 42, 73]


@pytest.mark.parametrize(
    ("documents", "texts"),
    [
        ("file", ["First line.\nSecond line.\n\nNext block.\n", "Other book.\n"]),
        ("line", ["First line.", "Second line.", "Next block.", "Other book."]),
        ("block", ["First line.\nSecond line.", "Next block.", "Other book."]),
    ],
)
def test_text_by_file_line_or_block(world, documents, texts):
    assert [sample["txt"].decode() for sample in converted(world / "books", "text", documents=documents)] == texts


def test_text_of_packed_json_lines(world):
    import gzip

    put(world / "c4.jsonl.gz", gzip.compress(b'{"body": "one", "url": "u"}\n\n{"body": "two"}\n'))
    one, two = converted(world / "c4.jsonl.gz", "text", column={"text": "body"})
    assert one == {"txt": b"one", "json": b'{"url": "u"}'}
    assert two == {"txt": b"two"}


def test_parquet_as_the_hub_keeps_it(world):
    samples = converted(world / "birds", "huggingface", column={"text": "caption"})
    assert [sample["txt"].decode() for sample in samples] == [f"bird {number}" for number in range(5)]
    assert [sample["png"] for sample in samples] == [picture(number, "PNG") for number in range(5)]
    assert facts_of(samples[3]) == {"label": 1, "label_name": "otter"}


def test_shuffled_parquet_holds_the_same_samples(world):
    plain = convert(world / "birds", "huggingface", column={"text": "caption"})
    mixed = convert(world / "birds", "huggingface", shuffle=3, column={"text": "caption"})
    assert members(mixed.paths) == members(plain.paths)
    assert list(members(mixed.paths)) != list(members(plain.paths))


def test_datasets_saved_by_the_library(world):
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "clip": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "kind": datasets.ClassLabel(names=["heron", "otter"]),
            "text": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [{"bytes": picture(number), "path": None} for number in range(4)],
        "clip": [
            {"bytes": clip(), "path": "x.flac"},
            None,
            {"bytes": None, "path": str(world / "photos/bark.flac")},
            None,
        ],
        "kind": [0, 1, 1, 0],
        "text": ["a", "b", None, "d"],
    }
    train = datasets.Dataset.from_dict(rows, features=features).cast_column("clip", datasets.Audio())
    datasets.DatasetDict(train=train).save_to_disk(world / "saved")
    samples = converted(world / "saved", "huggingface", split="train")
    assert [sample["jpg"] for sample in samples] == [picture(number) for number in range(4)]
    assert [sorted(sample) for sample in samples] == [
        ["flac", "jpg", "json", "txt"],
        ["jpg", "json", "txt"],
        ["flac", "jpg", "json"],
        ["jpg", "json", "txt"],
    ]
    assert samples[2]["flac"] == clip()
    assert facts_of(samples[2]) == {"kind": 1, "kind_name": "otter"}
    with pytest.raises(ConfigError, match=r"holds the splits train; name one: --split train"):
        converted(world / "saved", "huggingface")


def test_lists_of_images_make_chats_and_documents(world):
    images = [{"bytes": picture(1), "path": None}, {"bytes": picture(2), "path": None}]
    columns = {
        "cauldron": {"images": [images], "texts": [[{"user": "Which?", "assistant": "Both.", "source": "x"}]]},
        "document": {"images": [[None, images[0], images[1]]], "texts": [["One", None, None]]},
        "captioned": {"images": [images], "text": ["Two birds."]},
        "chat": {"images": [images], "messages": [[{"role": "user", "content": "<image> or <image>?"}]]},
    }
    found = {}
    for name, table in columns.items():
        pq.write_table(pa.table(table), world / f"{name}.parquet")
        (sample,) = converted(world / f"{name}.parquet", "table")
        assert [sample["0.jpg"], sample["1.jpg"]] == [picture(1), picture(2)]
        found[name] = chat_of(sample)
    assert found == {
        "cauldron": [("user", ["0.jpg", "1.jpg", "Which?"]), ("assistant", ["Both."])],
        "document": [("document", ["One", "0.jpg", "1.jpg"])],
        "captioned": [("document", ["0.jpg", "1.jpg", "Two birds."])],
        "chat": [("user", ["0.jpg", " or ", "1.jpg", "?"])],
    }


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("pets", "folder"),
        ("captions.csv", "table"),
        ("llava.json", "llava"),
        ("coco", "coco"),
        ("coco/annotations/captions_val2017.json", "coco"),
        ("vqa", "vqa"),
        ("vqa/v2_OpenEnded_mscoco_val2014_questions.json", "vqa"),
        ("books", "text"),
        ("books/one.txt", "text"),
        ("birds", "huggingface"),
        ("birds/data/train-00000-of-00001.parquet", "table"),
        ("photos", "folder"),
    ],
)
def test_kinds_that_are_told_from_the_path(world, source, kind):
    assert guess_kind(Path(source)) == kind


def test_a_path_that_may_be_several_things_lists_the_kinds(world):
    with pytest.raises(
        ConfigError, match=r"animals may be several things; .*--from imagefolder \(one folder per class\)"
    ):
        guess_kind(Path("animals"))
    with pytest.raises(DataError, match="no file or folder gone"):
        guess_kind(Path("gone"))


def test_options_that_say_nothing_about_a_kind_are_refused(world):
    with pytest.raises(
        ConfigError, match=r"--captions says nothing about plain text; --from text takes --column, --documents"
    ):
        source_rows(Path("books"), "text", ConvertOptions(captions="all"), FieldsConfig())
    with pytest.raises(ConfigError, match="--documents page: expected file, line, block"):
        source_rows(Path("books"), "text", ConvertOptions(documents="page"), FieldsConfig())
    with pytest.raises(ConfigError, match=r"--column picture=\.\.\.: expected one of image, audio, text, messages"):
        source_rows(Path("captions.csv"), "table", ConvertOptions(column={"picture": "file"}), FieldsConfig())


def _chat(*turns: tuple[str, str], **more) -> list[dict]:
    return [{**more, "conversations": [{"from": role, "value": text} for role, text in turns]}]


WRONG_CHATS = {
    "placeholder too many": (
        _chat(("human", "<image><image>"), image="0.jpg"),
        "more <image> placeholders than files: there are 1",
    ),
    "file too many": (
        _chat(("human", "<image>"), image=["0.jpg", "1.jpg"]),
        "1 files more than <image> and <audio> placeholders",
    ),
    "unknown role": (_chat(("narrator", "x")), "turn 0: role 'narrator' is none of human, user"),
    "no turns": ([{"conversations": []}], r"neither image nor audio nor text|expected a list of turns"),
    "no chat": ([{"text": "x"}], "no messages or conversations; got text"),
    "no object": (["x"], "element 1: expected a JSON object, got str"),
    "lost image": (
        _chat(("human", "x"), image="lost.jpg"),
        r"column image: no file .*lost\.jpg; paths are relative to .*--media",
    ),
    "outside": (_chat(("human", "x"), image="../llava.json/../x.jpg"), "lies outside of"),
    "number for text": ([{"conversations": [{"from": "human", "value": 3}]}], "turn 0: expected text, got 3"),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_wrong_chats_are_named_or_left_out(world, name):
    wrong, message = WRONG_CHATS[name]
    source = put(world / "wrong.json", [*chats(), *wrong])
    with pytest.raises(
        DataError, match=rf"wrong\.json, element [14]: .*{message}" if name != "no object" else "element 4"
    ):
        convert(source, "llava", media=world / "photos")
    result = convert(source, "llava", media=world / "photos", on_bad="skip")
    assert result.samples == 3
    ((origin, reason),) = result.left_out
    assert origin.endswith("wrong.json, element 4")
    listing = json.loads((Path(result.paths[0]).parent / "shard.left-out.jsonl").read_text())
    assert listing == {"origin": origin, "reason": reason}


WRONG_FILES = {
    "cut list": ("llava", "x.json", '[{"conversations": [', r"x\.json: not JSON after 0 elements"),
    "cut gzip": ("text", "x.jsonl.gz", b"\x1f\x8b\x08\x00abc", r"cannot read .*x\.jsonl\.gz"),
    "lines for coco": (
        "coco",
        "x.jsonl",
        '{"text": "a"}\n{"text": "b"}\n',
        r"expected one JSON object with a list 'images' of .*file_name, as COCO .*published; JSON lines are read by "
        r"--from table, or llava; got: .*x\.jsonl: not JSON after 0",
    ),
    "no captions": (
        "coco",
        "captions_x.json",
        {"images": []},
        r"captions_x\.json has no list 'images'; is it the right file",
    ),
    "no answers": ("vqa", "questions.json", {"questions": [{}]}, r"no answers for .*questions\.json.*--annotations"),
    "no arrow": ("huggingface", "x.arrow", b"ARROW1 no", r"x\.arrow is no arrow file"),
    "no columns": ("table", "x.csv", "a,b\n1,2\n", r"x\.csv, line 1: expected a header .*--column text=caption"),
    "latin text": ("text", "x.txt", b"gr\xfcn", r"x\.txt: not UTF-8: .* at byte 2"),
    "empty text": ("text", "x.txt", "\n \n", "there is no sample to write: the table or folder is empty"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named(world, name):
    kind, file, content, message = WRONG_FILES[name]
    with pytest.raises(DataError, match=message):
        convert(put(world / "wrong" / file, content), kind)
    assert not list((world / "wrong").rglob("*.tar"))
    assert not list((world / "wrong").rglob(".*partial*"))


def test_broken_escapes_are_no_text(world):
    put(world / "t.jsonl", '{"text": "fine"}\n{"text": "\\ud800"}\n{"text": "x", "more": {"a": "\\udfff"}}\n')
    result = convert(world / "t.jsonl", "table", on_bad="skip")
    assert result.samples == 1
    assert all("text that is no Unicode" in reason for _, reason in result.left_out)


def test_images_that_are_none_stop_the_build_or_are_left_out(world):
    put(world / "animals/heron/b.jpg", b"\xff\xd8\xffbroken")
    put(world / "animals/otter/d.png", picture(3, "PNG")[:20])
    with pytest.raises(
        DataError, match=r"heron/b\.jpg.*: not an image in JPEG, PNG, WEBP; .*--on-bad skip; no shard is finished"
    ):
        convert(world / "animals", "imagefolder")
    result = convert(world / "animals", "imagefolder", on_bad="skip")
    assert (result.samples, len(result.left_out)) == (3, 2)
    assert problems(result.paths) == [None] * 3


def test_splits_are_no_classes(world):
    for name in ("train", "val"):
        put(world / "both" / name / "heron/1.jpg", picture())
    with pytest.raises(
        ConfigError, match=r"both holds train, val, which are no classes; name one of them: .*both/train"
    ):
        convert(world / "both", "imagefolder")


def test_a_saved_dataset_cannot_name_files_elsewhere(world):
    _write_arrow(world / "private.arrow")
    assert len(converted(world / "private.arrow", "huggingface")) == 3
    put(world / "evil/state.json", {"_data_files": [{"filename": "../private.arrow"}]})
    with pytest.raises(DataError, match=r"state\.json names \.\./private\.arrow; not there"):
        convert(world / "evil", "huggingface")


def _write_arrow(path: Path) -> None:
    table = pa.table({"text": ["one", "two", "three"]})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def test_damaged_arrow_offsets_are_found_before_they_are_followed(world):
    _write_arrow(world / "t.arrow")
    data = bytearray((world / "t.arrow").read_bytes())
    at = data.rindex((6).to_bytes(4, "little") + (11).to_bytes(4, "little"))
    data[at : at + 4] = (2**30).to_bytes(4, "little")
    (world / "t.arrow").write_bytes(data)
    with pytest.raises(DataError, match=r"t\.arrow, row group 0, after row 0: damaged"):
        convert(world / "t.arrow", "huggingface")


def test_equal_sources_give_equal_bytes(world):
    one = convert(world / "llava.json", "llava", media=world / "photos")
    two = convert(world / "llava.json", "llava", media=world / "photos")
    assert digests(Path(one.paths[0]).parent) == digests(Path(two.paths[0]).parent)
