"""A folder with a small source of every kind, as docs/data/build.md names them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from PIL import Image

from trichord.shards.config import ShardsConfig
from trichord.shards.reader import open_sources


def picture(color: int = 10, format: str = "JPEG", size: tuple[int, int] = (16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (color % 256, 200, 30)).save(buffer, format)
    return buffer.getvalue()


def clip(frames: int = 800, format: str = "FLAC") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(frames) / 9) * 0.3, 8000, format=format)
    return buffer.getvalue()


def put(path: Path, content: bytes | str | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_world(root: Path) -> None:
    put(root / "pets/cat/1.jpg", picture(1))
    put(root / "pets/cat/1.txt", "a cat")
    put(root / "pets/2.wav", clip(format="WAV"))
    put(root / "pets/2.txt", "a bark")
    for number in range(6):
        put(root / f"photos/{number}.jpg", picture(number))
    put(root / "photos/bark.flac", clip())
    put(root / "captions.csv", "file,caption,licence\n0.jpg,a heron,cc0\n1.jpg,two herons,by\n")
    for name in ("heron/a.v2.jpg", "heron/old/b.png", "otter/c.jpg"):
        put(root / "animals" / name, picture(len(name), "PNG" if name.endswith("png") else "JPEG"))
    put(root / "llava.json", chats())
    put(root / "coco/annotations/captions_val2017.json", coco())
    for number in (9, 25):
        put(root / f"coco/val2017/{number:012d}.jpg", picture(number))
    questions, answers = vqa()
    put(root / "vqa/v2_OpenEnded_mscoco_val2014_questions.json", questions)
    put(root / "vqa/v2_mscoco_val2014_annotations.json", answers)
    for number in (42, 73):
        put(root / f"vqa/val2014/COCO_val2014_{number:012d}.jpg", picture(number))
    put(root / "books/one.txt", "First line.\nSecond line.\n\nNext block.\n")
    put(root / "books/two.txt", "Other book.\n")
    write_parquet(root / "birds/data/train-00000-of-00001.parquet")


def chats() -> list[dict]:
    return [
        {
            "id": "a",
            "image": "0.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is it?"},
                {"from": "gpt", "value": "A heron."},
            ],
        },
        {
            "id": "b",
            "image": ["1.jpg", "2.jpg"],
            "audio": "bark.flac",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Is <image> like <image>? And <audio>?"},
                {"from": "gpt", "value": "Yes. A dog."},
            ],
        },
        {"id": "c", "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
    ]


def coco() -> dict:
    return {
        "info": {"year": 2017},
        "images": [{"id": number, "file_name": f"{number:012d}.jpg", "height": 12} for number in (9, 25)],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "A heron. "},
            {"image_id": 9, "id": 2, "caption": "A grey bird."},
            {"image_id": 25, "id": 3, "caption": "An otter."},
        ],
    }


def vqa() -> tuple[dict, dict]:
    asked = [(42, 42000, "Is it a bird?", "yes"), (42, 42001, "What colour?", "grey"), (73, 73000, "How many?", "2")]
    questions = [{"image_id": image, "question": text, "question_id": number} for image, number, text, _ in asked]
    answers = [
        {
            "question_id": number,
            "multiple_choice_answer": answer,
            "answers": [{"answer": answer}, {"answer": "no"}],
        }
        for _, number, _, answer in asked
    ]
    return {"questions": questions}, {"annotations": answers}


def write_parquet(path: Path, rows: int = 5) -> None:
    """As the hub keeps a dataset of images: bytes in a struct, features in the schema."""
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["heron", "otter"]},
        "caption": {"_type": "Value", "dtype": "string"},
    }
    table = pa.table(
        {
            "image": [{"bytes": picture(number, "PNG"), "path": f"{number}.png"} for number in range(rows)],
            "label": [number % 2 for number in range(rows)],
            "caption": [f"bird {number}" for number in range(rows)],
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=2)


def members(paths: list[str] | list[Path]) -> dict[str, dict[str, bytes]]:
    """{key: {extension: bytes}} of all samples, read by webdataset."""
    import webdataset

    samples = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
    return {
        sample["__key__"]: {ext: data for ext, data in sample.items() if not ext.startswith("__")} for sample in samples
    }


def chat_of(sample: dict[str, bytes]) -> list[tuple[str, list[str]]]:
    """(role, texts and names of members) per message."""
    messages = json.loads(sample["json"])["messages"]
    return [(message["role"], [part[part["type"]] for part in message["content"]]) for message in messages]


def problems(paths: list[str] | list[Path]) -> list[str | None]:
    """What our index says of each sample."""
    (table,) = open_sources(ShardsConfig(sources=[{"name": "s", "shards": [str(path) for path in paths]}]))  # type: ignore[list-item]
    return [table.entry(number).problem for number in range(table.num_samples)]


def digests(folder: Path) -> dict[str, bytes]:
    """The bytes of every shard below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}
