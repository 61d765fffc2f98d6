"""Mutations of text and json members, and names that try to leave the archive."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

from trichord.inspection.fuzz.members import BLIND

NAMES = (
    "../../escape", "/etc/passwd", "/tmp/escape", "a/../../b", "..", ".", "", "./x", "C:\\x", "a b", "a\tb", "a\nb",
    "a\0b", "~/x", "$HOME/x", "`touch pwned`", "; touch pwned", "file:///etc/passwd", "http://127.0.0.1:9/x", "pipe:id",
    "x" * 90, "x" * 300, "d/" * 200 + "x", "\udcff\udcfe", "ключ", "a.b.c", ".hidden", "a..", "__meta__", "-rf", "%20",
    "\u202e", "\U0001f600",
)  # fmt: skip
"""Keys and paths as data: none may become a path on this machine."""

_NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, 1e308, -0.0, float("nan"), float("inf"))
_STRINGS = ("", " ", "\0", "\ud800", "\udfff\ud800", "a" * 30_000, "\ufeff", "<image>", "</s>", "\u0301" * 5000, "1")
_RAW_JSON = (
    b"[" * 200_000, b'{"a":' * 50_000, b"[" * 500 + b"]" * 500, b'{"prompt": 1e999}', b'{"n": ' + b"9" * 6000 + b"}",
    b'{"prompt": NaN}', b'{"group": Infinity}', b'{"prompt": "\\ud800"}', b'{"prompt": "\\u0000"}', b"null", b"[]",
    b"1", b'"x"', b"{}", b"", b" ", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b'{"a":1}{"b":2}', b'{"a":1}\0',
    b'{"a":1,"a":2}',
    b"{'a':1}", b'{"prompt": "\xff"}',
    b'{"group": ' + b"1" * 5000 + b"}", b'{"messages": ' + b"[" * 3000 + b"]" * 3000 + b"}",
)  # fmt: skip
_ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "", None, 3, "USER", "\ud800", "a" * 5000)
_KINDS = ("image", "audio", "text", "video", "image_url", "input_audio", "", None, 7, "__class__")


class Canary:
    """Unpickled, it leaves a file behind: whoever reads pickles is found out."""

    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def mangle_text(rng: random.Random, data: bytes) -> bytes:
    """Not UTF-8, too long, of odd characters, or another format altogether."""
    odd = (
        b"\xff\xfe", b"caf\xe9", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\0" * 100, b"a\0b", b"\r\n" * 50,
        b"\xef\xbb\xbf", b"", b" \t\n", b"a" * 19_999, b"a " * 9_999, b"a" * 2**20, b"\n" * 2**20, 
        b"<image><audio></s>" * 99,
        "\ufdfa".encode() * 6000, "a\u0301".encode() * 9000, "\u0344".encode() * 19_000, 
        "\U0001f468\u200d".encode() * 5000,
        "\u202e\u2066".encode() * 999, "ﬀ".encode() * 15_000, b"<image>", b"<bos>" * 3000, "𝔄".encode() * 19_999,
        pickle.dumps(Canary()), rng.randbytes(5000), data.decode(errors="replace").encode("utf-16"), 
        b"%s%n{0}{}" * 100,
    )  # fmt: skip
    return rng.choice(odd) if rng.random() < 0.7 else rng.choice(BLIND)(rng, data)


def mangle_json(rng: random.Random, data: bytes) -> bytes:
    """Raw bytes that parsers stumble over, wrong types anywhere, chats that name what is not theirs."""
    way = rng.random()
    if way < 0.25:
        return rng.choice((*_RAW_JSON, pickle.dumps(Canary())))
    if way < 0.4:
        return rng.choice(BLIND)(rng, data)
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        return rng.choice(_RAW_JSON)
    meta = _chat(rng) if way < 0.7 else meta
    for _ in range(rng.choice((1, 1, 2, 4))):
        meta = _replace_somewhere(rng, meta)
    return json.dumps(meta).encode()


def _chat(rng: random.Random) -> Any:
    """A chat with roles, parts and names drawn from good and bad ones."""
    names = ("0.jpg", "0.png", "0.webp", "clip.wav", "clip.flac", "jpg", "txt", "json", "missing.jpg", *NAMES)
    messages = []
    for _ in range(rng.choice((0, 1, 2, 3, 50, 3000))):
        parts: list[Any] = []
        for _ in range(rng.choice((0, 1, 2, 20))):
            kind = rng.choice(_KINDS)
            parts.append({"type": kind, str(kind): rng.choice(names), "text": rng.choice(("hello", *_STRINGS[:6]))})
        content = rng.choice((parts, parts, parts, "plain words", None, 5, {"type": "text"}))
        messages.append({"role": rng.choice(_ROLES[:3] if rng.random() < 0.8 else _ROLES), "content": content})
    return {"messages": messages, **({"prompt": "x"} if rng.random() < 0.2 else {})}


def _replace_somewhere(rng: random.Random, value: Any) -> Any:
    """A copy with one value, at any depth, replaced by one of another type or size."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        return {**value, key: _replace_somewhere(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], _replace_somewhere(rng, value[at]), *value[at + 1 :]]
    nested: Any = "x"
    for _ in range(rng.choice((3, 400))):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    odd = (*_NUMBERS, *_STRINGS, None, True, False, [], {}, [[]], [1, "a", None], nested, *NAMES)
    return rng.choice(odd)
