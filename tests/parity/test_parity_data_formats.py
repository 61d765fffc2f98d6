"""The same shards through `webdataset`, through megatron-energon and through us: the same keys, bytes and texts."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

from trichord.building.build import build_shards
from trichord.building.folder import rows_from_folder
from trichord.samples.config import TextConfig
from trichord.samples.text import decode_text
from trichord.shards.config import FieldsConfig, ShardsConfig, SourceConfig
from trichord.shards.reader import open_sources, read_ref

Samples = list[tuple[str, dict[str, bytes]]]
"""(key, members by extension) in the order of the shards."""

SAMPLES = 23
PER_SHARD = 10
ENERGON = """
import json, sys
from pathlib import Path
from megatron.energon import CrudeWebdataset, WorkerConfig, get_loader
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory

folder, tars = Path(sys.argv[1]), json.loads(sys.argv[2])
BaseWebdatasetFactory.prepare_dataset(folder, tars, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1)
one = WorkerConfig(rank=0, world_size=1, num_workers=0)
made = CrudeWebdataset(EPath(folder), split_part="train", training=False, worker_config=one, decoder=None)
seen = []
for sample in get_loader(made.build()):
    members = {ext: bytes(data).hex() for ext, data in sample.items() if not ext.startswith("__")}
    seen.append([sample["__key__"], members])
print("SAMPLES" + json.dumps(seen))
"""


def picture(rng: np.random.Generator, image_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(buffer, image_format)
    return buffer.getvalue()


def clip(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * rng.standard_normal(800), 16_000, format="FLAC")
    return buffer.getvalue()


def contents() -> list[dict[str, bytes]]:
    """Triples, some members absent, texts of several scripts."""
    rng, samples = np.random.default_rng(7), []
    for number in range(SAMPLES):
        meta = {"similarity": number / SAMPLES, "caption": "ein Vogel 鳥"}
        members = {"jpg": picture(rng, "JPEG"), "txt": f"Vogel {number}, птица, 鳥\n".encode()}
        members["json"] = json.dumps(meta, ensure_ascii=number % 2 == 0).encode()
        if number % 3 == 0:
            members["flac"] = clip(rng)
        samples.append(members)
    return samples


def by_shard_writer(folder: Path) -> Samples:
    """`webdataset.ShardWriter`, as its documentation shows it: PAX headers, float times."""
    samples = [(f"sample{number:06d}", members) for number, members in enumerate(contents())]
    with webdataset.ShardWriter(f"file:{folder}/shard-%06d.tar", maxcount=PER_SHARD, verbose=0) as sink:
        for key, members in samples:
            sink.write({"__key__": key, **members})
    return [(key, dict(sorted(members.items()))) for key, members in samples]


def by_img2dataset(folder: Path) -> Samples:
    """img2dataset's folder: five digits of shard, nine of key, jpg, txt and json; parquet and stats beside each tar."""
    samples = []
    for first in range(0, SAMPLES, PER_SHARD):
        shard = first // PER_SHARD
        with webdataset.TarWriter(f"{folder}/{shard:05d}.tar") as sink:
            for place, members in enumerate(contents()[first : first + PER_SHARD]):
                members.pop("flac", None)
                samples.append((f"{shard:05d}{place:04d}", members))
                sink.write({"__key__": samples[-1][0], **members})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1 of the metadata PAR1")
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": PER_SHARD, "successes": PER_SHARD}))
    return samples


def by_hugging_face(folder: Path) -> Samples:
    """Keys in sub-folders, members of more than one dot, as datasets on the Hugging Face hub have them."""
    samples = []
    for number, members in enumerate(contents()):
        renamed = {"jpg": "image.jpg", "flac": "sound.left.flac", "txt": "txt", "json": "json"}
        samples.append((f"train/n{number % 3:02d}/{number:08d}", {renamed[ext]: data for ext, data in members.items()}))
    for first in range(0, SAMPLES, PER_SHARD):
        write_tar(folder / f"train-{first // PER_SHARD:05d}-of-00003.tar", samples[first : first + PER_SHARD])
    return samples


def by_gnu_tar(folder: Path) -> Samples:
    """`tar cf` over a folder with long names and a folder entry; sorted, as --sort=name does."""
    samples = [("very-" * 25 + f"long/{number:04d}", members) for number, members in enumerate(contents()[:9])]
    for key, members in samples:
        for ext, data in members.items():
            path = folder / "files" / f"{key}.{ext}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    top = samples[0][0].split("/")[0]
    command = ["tar", "--sort=name", "--format=gnu", "-cf", str(folder / "a.tar"), "-C", str(folder / "files"), top]
    subprocess.run(command, check=True)
    return [(key, dict(sorted(members.items()))) for key, members in samples]


def by_trichord(folder: Path) -> Samples:
    """`trichord data build` from a folder of files."""
    files, samples = folder / "files", []
    for number, members in enumerate(contents()):
        members = {ext: data for ext, data in members.items() if ext != "json"}
        samples.append((f"{number:04d}", members))
        for ext, data in members.items():
            path = files / f"{number:04d}.{ext}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    build_shards(rows_from_folder(files, FieldsConfig()), folder, samples_per_shard=PER_SHARD, even=False)
    return samples


def write_tar(path: Path, samples: Samples) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            for ext, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


LAYOUTS = (by_shard_writer, by_img2dataset, by_hugging_face, by_gnu_tar, by_trichord)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__.removeprefix("by_"))
def written(request, tmp_path) -> tuple[Path, Samples]:
    """A folder of shards, and what was put into them."""
    return tmp_path, request.param(tmp_path)


def read_by_us(folder: Path) -> Samples:
    """Every member of every sample, as chats and fields get at them."""
    table = open_sources(ShardsConfig(sources=(SourceConfig(name="x", shards=(str(folder / "*.tar"),)),)))[0]
    samples = []
    for number in range(table.num_samples):
        entry = table.entry(number)
        refs = {ref.ext: ref for ref in (*(s.ref for s in entry.siblings.values()), *entry.members.values())}
        samples.append((entry.key, {ext: read_ref(entry.shard, ref, 2**20) for ext, ref in refs.items()}))
        assert entry.problem is None or "no member with a mapped extension" in entry.problem
    return samples


def read_by_webdataset(folder: Path) -> Samples:
    urls = sorted(map(str, folder.glob("*.tar")))
    stream = webdataset.WebDataset(urls, shardshuffle=False, handler=webdataset.reraise_exception)
    return [(sample["__key__"], {e: d for e, d in sample.items() if not e.startswith("__")}) for sample in stream]


def read_by_energon(folder: Path) -> Samples:
    """In a process of its own: megatron-energon prepares its index files and reads through them."""
    tars = sorted(path.name for path in folder.glob("*.tar"))
    command = [sys.executable, "-c", ENERGON, str(folder), json.dumps(tars)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("SAMPLES"))
    seen = json.loads(line.removeprefix("SAMPLES"))
    return [(key, {ext: bytes.fromhex(data) for ext, data in members.items()}) for key, members in seen]


def test_we_and_webdataset_read_what_was_written(written):
    folder, samples = written
    ours = read_by_us(folder)
    assert ours == samples
    assert read_by_webdataset(folder) == ours


def test_texts_and_fields_are_what_webdataset_decodes(written):
    folder, samples = written
    table = open_sources(ShardsConfig(sources=(SourceConfig(name="x", shards=(str(folder / "*.tar"),)),)))[0]
    urls = sorted(map(str, folder.glob("*.tar")))
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    for number, theirs in enumerate(decoded):
        entry = table.entry(number)
        text = decode_text(read_ref(entry.shard, entry.members["text"], 2**20), TextConfig(strip=False))
        assert text == theirs["txt"]
        assert entry.text_chars == len(theirs["txt"])
        if "meta" in entry.members:
            assert json.loads(read_ref(entry.shard, entry.members["meta"], 2**20)) == theirs["json"]
        if entry.image_size is not None:
            assert entry.image_size == (30, 20)
    assert len(decoded) == table.num_samples == len(samples)


@pytest.mark.slow
def test_energon_reads_the_same(written):
    pytest.importorskip("megatron.energon", reason="megatron-energon is not installed (pip install 'trichord[dev]')")
    folder, _ = written
    assert sorted(read_by_energon(folder)) == sorted(read_by_us(folder))
