"""One case of the attack: a shard and what is wrong with it, a pure function of (seed, number)."""

from __future__ import annotations

import random
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from trichord.core.seed import derive_seed
from trichord.inspection.fuzz.archives import mangle_gzip, mangle_tar
from trichord.inspection.fuzz.corpus import Piece, base_samples, tar_bytes
from trichord.inspection.fuzz.members import BLIND, HEADERS
from trichord.inspection.fuzz.sidecars import mangle_sidecars
from trichord.inspection.fuzz.texts import NAMES, Canary, mangle_json, mangle_text
from trichord.shards.index import build_index

_FAMILIES = ("member", "header", "header", "json", "text", "name", "tar", "tar", "sidecar", "gzip")
_LAYOUTS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
_EXTENSIONS = ("jpg", "PNG", "txt", "json", "wav", "flac", "tar.gz.jpg", "pkl", "a.pth", "pyd", "", ".", "J P G", "npy",
               "x" * 200, "cls", "0.jpg.jpg", "exe")  # fmt: skip
_KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
          tarfile.CONTTYPE, tarfile.AREGTYPE, b"S", b"V", b"M")  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is attacked, and with what: the shard's bytes, and for sidecar cases the seed of their mutation."""

    number: int
    families: tuple[str, ...]
    shard_name: str
    shard: bytes
    sidecar_seed: int | None = None
    options: dict[str, bool] = field(default_factory=dict)


def make_case(seed: int, number: int) -> Case:
    """Case `number`: two to five valid samples with one to three faults. Number -1 is a shard of all valid samples."""
    rng = random.Random(derive_seed(seed, "fuzz", number))
    if number < 0:
        pieces = [piece for index, _ in enumerate(base_samples()) for piece in _pieces(rng, index)]
        return Case(number, (), "shard.tar", tar_bytes(pieces, tarfile.PAX_FORMAT))
    families = tuple(rng.choice(_FAMILIES) for _ in range(rng.choice((1, 1, 2, 3))))
    chosen = rng.sample(range(len(base_samples())), rng.randrange(2, 6))
    pieces = [piece for index in chosen for piece in _pieces(rng, index)]
    for family in families:
        _mangle_piece(rng, family, pieces)
    if rng.random() < 0.1:
        rng.shuffle(pieces)
    shard, name = tar_bytes(pieces, rng.choice(_LAYOUTS)), "shard.tar"
    for _ in range(families.count("tar")):
        shard = mangle_tar(rng, shard)
    if "gzip" in families:
        shard, name = mangle_gzip(rng, shard), rng.choice((*("shard.tar.gz", "shard.tgz") * 3, "shard.tar"))
    options = {option: rng.random() < 0.5 for option in ("augment", "crop", "nfkc", "split", "filters")}
    sidecar_seed = rng.getrandbits(60) if "sidecar" in families and {"tar", "gzip"}.isdisjoint(families) else None
    return Case(number, families, name, shard, sidecar_seed, options)


def write_case(case: Case, folder: Path) -> Path:
    """Put the case's files into `folder`; returns the shard. To mangle sidecars it has them built first."""
    shard = folder / case.shard_name
    shard.write_bytes(case.shard)
    if case.sidecar_seed is not None:
        build_index(str(shard))
        places = (folder / "shard.idx", folder / "shard.len")
        mangled = mangle_sidecars(random.Random(case.sidecar_seed), *(place.read_bytes() for place in places))
        for place, content in zip(places, mangled):
            place.unlink() if content is None else place.write_bytes(content)
    return shard


def _pieces(rng: random.Random, index: int) -> list[Piece]:
    """The members of base sample `index` under a key of one of the shapes that occur in the wild."""
    stem = f"{index:09d}"
    key = rng.choice((stem, stem, f"a/b/{stem}", f"./{stem}", "d" * 120 + f"/{stem}", f"ключ {stem}"))
    return [Piece(f"{key}.{ext}", data) for ext, data in base_samples()[index].items()]


def _mangle_piece(rng: random.Random, family: str, pieces: list[Piece]) -> None:
    """One fault in one member, or in its name."""
    last_parts = [piece.name.rsplit(".", 1)[-1] for piece in pieces]
    if family == "name":
        return _mangle_name(rng, pieces)
    fitting = {"text": ("txt",), "json": ("json",), "header": tuple(HEADERS)}.get(family)
    candidates = [at for at, ext in enumerate(last_parts) if fitting is None or ext in fitting]
    if family not in ("member", "header", "json", "text"):
        return None
    if not candidates:  # a chat or a text for a sample that has none
        stem = pieces[0].name.split(".", 1)[0]
        pieces.insert(1, Piece(f"{stem}.{'json' if family == 'json' else 'txt'}", b"{}"))
        candidates, last_parts = [1], ["", "json" if family == "json" else "txt"]
    piece = pieces[rng.choice(candidates)]
    ext = piece.name.rsplit(".", 1)[-1]
    if family == "json":
        piece.data = mangle_json(rng, piece.data)
    elif family == "text":
        piece.data = mangle_text(rng, piece.data)
    elif family == "header" and ext in HEADERS:
        piece.data = HEADERS[ext](rng, piece.data)
    else:
        piece.data = rng.choice(BLIND)(rng, piece.data)
    return None


def _mangle_name(rng: random.Random, pieces: list[Piece]) -> None:
    """Names that try to leave the archive, kinds of members that are no files, doubled and pickled members."""
    at = rng.randrange(len(pieces))
    piece = pieces[at]
    stem, _, ext = piece.name.partition(".")
    way = rng.randrange(6)
    if way == 0:
        piece.name = f"{rng.choice(NAMES)}.{ext}"
    elif way == 1:
        piece.name = f"{stem}.{rng.choice(_EXTENSIONS)}"
    elif way == 2:
        link = rng.choice(("/etc/passwd", "../../etc/passwd", pieces[0].name, piece.name, ""))
        piece.kind, piece.link = rng.choice(_KINDS), link
    elif way == 3:
        pieces.insert(at, Piece(piece.name, rng.randbytes(20)))
    elif way == 4:
        import pickle

        pieces.insert(
            at, Piece(f"{stem}.{rng.choice(('pkl', 'PTH', 'x.pt', 'pickle', 'pyd'))}", pickle.dumps(Canary()))
        )
    else:
        pieces[at:at] = [Piece(f"{stem}.{number}.{ext}", piece.data) for number in range(rng.choice((3, 80, 700)))]
