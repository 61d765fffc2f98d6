"""Mutations of `.idx` and `.len`: lines, numbers, columns, and headers that vouch for what they should not."""

from __future__ import annotations

import json
import random
from typing import Any

from trichord.inspection.fuzz.members import BLIND
from trichord.shards.sidecars import digest

_WORDS = ("0", "-1", "1", "512", "99999999", str(2**63), str(2**70), "9" * 5000, "1e5", "0x10", "1_0", "abc", "",
          "٣", "+7", "-0", "1.5", "nan", "../../x.jpg", "/etc/passwd", "jpg", "pkl", "\x00",
          "\udcff", "a.b")  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), True, "", "x", "a" * 9000, "\ud800", [], {},
    [0, 0], [-1, 5], [1], [1, 2, 3], [10**9, 10**9], [0.5, 2], ["a", "b"], [None, None], [8, 0],
    [2**63, 16_000], [1, 10**30],
    {"problem": 5}, {"problem": None}, {"names": 3}, {"names": []}, {"names": ["a"]}, {"names": [1, 2]}, [[1], [2]],
    {"numbered": 3}, {"numbered": {"0.jpg": {"image": [1]}}}, {"numbered": {"0.jpg": 5}}, {"numbered": []},
)  # fmt: skip


def mangle_sidecars(rng: random.Random, idx: bytes, lengths: bytes) -> tuple[bytes | None, bytes | None]:
    """(.idx, .len) with a fault; None where the file is missing. Often the header's digest and counts are set right."""
    way = rng.random()
    if way < 0.1:
        return rng.choice(((None, lengths), (idx, None), (b"", lengths), (idx, b""), (lengths, idx), (idx, idx)))
    if way < 0.25:
        both = [idx, lengths]
        which = rng.randrange(2)
        both[which] = rng.choice(BLIND)(rng, both[which])
        return both[0], _vouched(rng, both[0], both[1])
    if way < 0.6:
        idx = _idx_lines(rng, idx)
    elif way < 0.9:
        lengths = _len_lines(rng, lengths)
    else:
        lengths = _len_header(rng, lengths)
    return idx, _vouched(rng, idx, lengths)


def _idx_lines(rng: random.Random, idx: bytes) -> bytes:
    lines = idx.decode(errors="surrogateescape").split("\n")
    at = rng.randrange(len(lines))
    words = lines[at].split(" ")
    way = rng.randrange(6)
    if way <= 2:
        words[rng.randrange(len(words))] = rng.choice(_WORDS)
        lines[at] = " ".join(words)
    elif way == 3:
        del words[rng.randrange(len(words))]
        lines[at] = " ".join(words)
    elif way == 4:
        lines[at] = rng.choice(("", " ", lines[at] * 2, " ".join([lines[at]] * 500), "jpg 0 1 x.jpg " * 5000))
    else:
        lines = rng.choice((lines[:-2], lines[:1], lines[::-1], lines + lines[1:], ["v9.9 5", *lines[1:]]))
    return "\n".join(lines).encode(errors="surrogateescape")


def _len_lines(rng: random.Random, lengths: bytes) -> bytes:
    lines = lengths.split(b"\n")
    at = rng.randrange(1, max(2, len(lines) - 1)) if len(lines) > 2 else 0
    way = rng.randrange(5)
    try:
        values = json.loads(lines[at])
    except ValueError:
        way, values = 4, []
    if way <= 1 and values:
        values[rng.randrange(len(values))] = rng.choice(_VALUES)
    elif way == 2:
        values = [*values, rng.choice(_VALUES)]
    elif way == 3:
        values = rng.choice((values[:-1], [], values[::-1], values * 2, {}, 5, None, "x"))
    else:
        raw = (b"", b"[", b"[" * 100_000, b"null", b"\xff\xfe", b'["\\ud800"]', b"[1e999]", b"[" + b"9" * 6000 + b"]")
        lines[at] = rng.choice(raw)
        return b"\n".join(lines)
    lines[at] = json.dumps(values).encode()
    return b"\n".join(lines)


def _len_header(rng: random.Random, lengths: bytes) -> bytes:
    first, _, rest = lengths.partition(b"\n")
    header = json.loads(first)
    key = rng.choice(list(header))
    values = (*_VALUES, [["image", "jpg"]], [["image"]], [["x", "y", "z"]], {"size": -1}, {"bytes": 1, "blake2b": 5})
    header[key] = rng.choice(values)
    if rng.random() < 0.2:
        header = rng.choice(({}, {**header, "more": 1}, [header], {"format": "trichord-len", "version": 1}))
    return json.dumps(header).encode() + b"\n" + rest


def _vouched(rng: random.Random, idx: bytes | None, lengths: bytes | None) -> bytes | None:
    """The `.len` with the digest (and at times the count) of the `.idx` as it is now: a lie that holds together."""
    if idx is None or lengths is None or rng.random() < 0.2:
        return lengths
    first, _, rest = lengths.partition(b"\n")
    try:
        header = json.loads(first)
        header["idx"], header["body"] = digest(idx), digest(rest)
        if rng.random() < 0.3:
            header["samples"] = max(0, idx.count(b"\n") - 1)
        return json.dumps(header, separators=(",", ":")).encode() + b"\n" + rest
    except (ValueError, TypeError, RecursionError):
        return lengths
